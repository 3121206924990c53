-- A key's newest pairs older than an id that match. CROSS JOIN: the matches lead, whatever the planner
-- thinks of the index by key.
SELECT h.id, h.created_at, h.question, h.answer, h.model, h.finish_reason,
       h.prompt_tokens, h.completion_tokens, h.total_tokens, h.latency_ms
FROM history_words
CROSS JOIN history AS h ON h.id = history_words.rowid
WHERE history_words MATCH ?1 AND history_words.rowid < ?2 AND h.key_name = ?3
ORDER BY history_words.rowid DESC
LIMIT ?4
