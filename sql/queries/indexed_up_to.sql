-- Notes how far the words are indexed.
UPDATE indexed SET up_to = ?1
