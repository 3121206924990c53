-- Shows that the history can be written. A value that does not change would not be: SQLite skips that.
UPDATE indexed SET probes = probes + 1
