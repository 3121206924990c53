-- Bytes inside the database that new rows take before the file grows.
SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size;
