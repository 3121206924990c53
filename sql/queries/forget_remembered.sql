-- Drops some of what was remembered for longer than a day, or answered by a pair that retention has deleted: it is older
-- than the oldest pair, and of a lower id, since the clock may have been set back. In two halves, each by the index: the
-- table is large.
DELETE FROM idempotency
WHERE (key_name, idempotency_key) IN (
    SELECT *
    FROM (
        SELECT key_name, idempotency_key
        FROM idempotency
        WHERE created_at <= unixepoch() - 86400
        UNION ALL
        SELECT key_name, idempotency_key
        FROM idempotency
        WHERE created_at <= (SELECT unixepoch(created_at) FROM history ORDER BY id LIMIT 1)
          AND history_id < (SELECT min(id) FROM history)
    )
    LIMIT ?1
)
