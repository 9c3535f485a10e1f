-- 0003: which queues a worker group serves, and with how many slots.
--
-- Why. "No live group serves this queue" and "all its slots are busy" are the two answers an operator
-- needs most, and nobody else can give them. Written once, at the registration; the beat does not touch
-- them. Null: a group of an older version, which did not say.

ALTER TABLE triojobs.worker_groups
    ADD COLUMN queues      jsonb CHECK (jsonb_typeof(queues) = 'object'),  -- queue -> slots
    ADD COLUMN concurrency int   CHECK (concurrency >= 1);                 -- cap of the sum of the slots

-- Newest first, page by page, however many registrations are kept.
CREATE INDEX worker_groups_registered ON triojobs.worker_groups (registered_at, id);
