-- A key's pairs older than an id that match, best first. Ranked are the newest 1,000 matches: ranking
-- every match of a common word would take a second in a history of a million pairs.
SELECT h.id, h.created_at, h.question, h.answer, h.model, h.finish_reason,
       h.prompt_tokens, h.completion_tokens, h.total_tokens, h.latency_ms
FROM (
    SELECT rowid AS id, bm25(history_words) AS score
    FROM history_words
    WHERE history_words MATCH ?1 AND rowid < ?2
    ORDER BY rowid DESC
    LIMIT 1000
) AS found
JOIN history AS h ON h.id = found.id
WHERE h.key_name = ?3
ORDER BY found.score, h.id DESC
LIMIT ?4
