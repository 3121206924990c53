-- Bytes of the bodies that are noted of requests.
SELECT coalesce(sum(octet_length(request) + coalesce(octet_length(response), 0)), 0) FROM idempotency
