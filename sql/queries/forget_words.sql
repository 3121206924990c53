-- Takes the words of a row out of the index, where they are in it.
DELETE FROM history_words WHERE rowid = ?1 AND ?1 <= (SELECT up_to FROM indexed)
