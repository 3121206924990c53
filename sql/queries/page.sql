-- A key's pairs older than an id, newest first.
SELECT id, created_at, question, answer, model, finish_reason,
       prompt_tokens, completion_tokens, total_tokens, latency_ms
FROM history
WHERE key_name = ?1 AND id < ?2
ORDER BY id DESC
LIMIT ?3
