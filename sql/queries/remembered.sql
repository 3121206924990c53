-- The request that came with an Idempotency-Key within the last day, and what answered it.
SELECT h.id, h.created_at, h.question, h.answer, h.model, h.finish_reason,
       h.prompt_tokens, h.completion_tokens, h.total_tokens, h.latency_ms,
       i.path, i.request, i.response
FROM idempotency AS i
JOIN history AS h ON h.id = i.history_id AND h.key_name = i.key_name
WHERE i.key_name = ?1 AND i.idempotency_key = ?2 AND i.created_at > unixepoch() - 86400
