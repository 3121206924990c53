-- Takes the words of the oldest rows, up to an id, out of the index.
DELETE FROM history_words
WHERE rowid IN (SELECT id FROM history WHERE id <= ?1 AND id <= (SELECT up_to FROM indexed))
