-- The signs of vowels of Indic and other scripts are part of a word. SQLite knows no newer symbols and takes them for letters,
-- so texts go into the index without any; see index_words.sql. What is there is indexed anew.
DROP TABLE history_words;
CREATE VIRTUAL TABLE history_words USING fts5 (
    key, question, answer,
    content = '', contentless_delete = 1, tokenize = "unicode61 remove_diacritics 2 categories 'L* N* Mn Mc'"
);
INSERT INTO history_words (history_words, rank) VALUES ('deletemerge', 100);
UPDATE indexed SET up_to = 0;
