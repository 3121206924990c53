-- How many pairs older than an id match, of any key, counted up to a limit.
SELECT count(*)
FROM (SELECT 1 FROM history_words WHERE history_words MATCH ?1 AND rowid < ?2 LIMIT ?3)
