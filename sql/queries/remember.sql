-- Notes which pair answered a request with an Idempotency-Key; a note older than a day gives way.
INSERT OR REPLACE INTO idempotency (key_name, idempotency_key, path, request, response, history_id, created_at)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, unixepoch())
