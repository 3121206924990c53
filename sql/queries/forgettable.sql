-- What was remembered for longer than a day, or answered by a pair that retention has deleted: it is older than the oldest
-- pair, and of a lower id, since the clock may have been set back. In two halves, each by the index: the table is large. With
-- the bytes of its bodies; some may be there twice.
SELECT rowid, octet_length(request) + coalesce(octet_length(response), 0)
FROM idempotency
WHERE created_at <= unixepoch() - 86400
UNION ALL
SELECT rowid, octet_length(request) + coalesce(octet_length(response), 0)
FROM idempotency
WHERE created_at <= (SELECT unixepoch(created_at) FROM history ORDER BY id LIMIT 1)
  AND history_id < (SELECT min(id) FROM history)
LIMIT ?1
