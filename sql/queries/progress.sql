-- The newest row's id, and up to which row the words are indexed.
SELECT coalesce((SELECT max(id) FROM history), 0), (SELECT up_to FROM indexed)
