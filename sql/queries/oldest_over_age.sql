-- The last of the oldest rows that are older than a number of days, or null.
SELECT max(id)
FROM (SELECT id, created_at FROM history ORDER BY id LIMIT ?1)
WHERE created_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || ?2 || ' days')
