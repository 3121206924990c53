-- A new pair; its id is the row's. It follows the newest row's and the last one that was given (?11), since
-- the newest row may have been deleted.
INSERT INTO history (id, created_at, key_name, question, answer, model, finish_reason,
                     prompt_tokens, completion_tokens, total_tokens, latency_ms)
VALUES (max(?11, (SELECT last_id FROM indexed), (SELECT coalesce(max(id), 0) FROM history)) + 1,
        ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
