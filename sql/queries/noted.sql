-- Whether anything is noted of a request with this Idempotency-Key.
SELECT 1 FROM idempotency WHERE key_name = ?1 AND idempotency_key = ?2
