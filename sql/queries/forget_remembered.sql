-- Drops some of what was remembered for longer than a day, or answered by a pair that retention has deleted: it is older
-- than the oldest pair, and of a lower id, since the clock may have been set back. In two halves, each by the index: the
-- table is large. At most so many, and so many bytes of bodies beyond the first.
DELETE FROM idempotency
WHERE rowid IN (
    SELECT note
    FROM (
        SELECT note, row_number() OVER rows AS number, sum(bytes) OVER rows AS bytes
        FROM (
            SELECT rowid AS note, octet_length(request) + coalesce(octet_length(response), 0) AS bytes
            FROM idempotency
            WHERE created_at <= unixepoch() - 86400
            UNION ALL
            SELECT rowid, octet_length(request) + coalesce(octet_length(response), 0)
            FROM idempotency
            WHERE created_at <= (SELECT unixepoch(created_at) FROM history ORDER BY id LIMIT 1)
              AND history_id < (SELECT min(id) FROM history)
            LIMIT ?1
        )
        WINDOW rows AS (ROWS UNBOUNDED PRECEDING)
    )
    WHERE number = 1 OR bytes <= ?2
)
