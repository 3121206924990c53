-- How many pairs there are.
SELECT count(*) FROM history
