-- Retention deletes the oldest rows first, so whole segments of the index die and are dropped as they are.
-- The default, to rewrite a segment when a tenth of it is dead, stalls the writer for seconds.
INSERT INTO history_words (history_words, rank) VALUES ('deletemerge', 100);
