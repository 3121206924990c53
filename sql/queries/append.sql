-- A new pair; its id is the row's.
INSERT INTO history (created_at, key_name, question, answer, model, finish_reason,
                     prompt_tokens, completion_tokens, total_tokens, latency_ms)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
