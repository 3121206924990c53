-- Those of the oldest rows that are older than a number of days. Rows of the future, which a clock that was wrong left
-- behind, are passed over: otherwise they would keep all others.
SELECT id
FROM (SELECT id, created_at
      FROM history
      WHERE created_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      ORDER BY id
      LIMIT ?1)
WHERE created_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || ?2 || ' days')
