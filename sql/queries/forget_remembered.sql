-- Drops what was remembered for longer than a day.
DELETE FROM idempotency WHERE created_at <= unixepoch() - 86400
