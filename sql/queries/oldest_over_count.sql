-- The last of the oldest rows when so many have to go, or null.
SELECT max(id) FROM (SELECT id FROM history ORDER BY id LIMIT ?1)
