-- The oldest rows, when so many have to go.
SELECT id FROM history ORDER BY id LIMIT ?1
