-- The last id that was given, as far as it is known, and up to which row the words are indexed.
SELECT max(coalesce((SELECT max(id) FROM history), 0), last_id), up_to FROM indexed
