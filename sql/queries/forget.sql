-- Deletes a row.
DELETE FROM history WHERE id = ?1
