-- The last id that was given, as far as it is known, and up to which row the words are indexed.
SELECT max(coalesce((SELECT max(id) FROM history), 0), up_to), up_to FROM indexed
