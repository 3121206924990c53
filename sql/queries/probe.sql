-- Changes nothing, but has to be written: shows that the history can be.
UPDATE indexed SET up_to = up_to
