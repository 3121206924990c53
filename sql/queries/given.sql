-- Notes the last id that was given.
UPDATE indexed SET last_id = max(last_id, ?1)
