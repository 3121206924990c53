-- Notes how far the words are indexed, and the last id that was given.
UPDATE indexed SET up_to = ?1, last_id = max(last_id, ?2)
