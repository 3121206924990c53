-- Deletes the oldest rows, up to an id.
DELETE FROM history WHERE id <= ?1
