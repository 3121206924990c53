-- Drops what is remembered of a request.
DELETE FROM idempotency WHERE rowid = ?1
