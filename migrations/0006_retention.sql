-- 0006: removing what is older than anybody wants to keep it.
--
-- Why partitions are dropped. To delete a million bodies costs as much again as to have run them, and
-- leaves work for VACUUM; to drop a partition takes 10 ms under a lock, whatever is in it.

-- Whose turn it is: one worker group at a time does a chore, and not before `next_at`.
CREATE TABLE triojobs.chores (
    name    text        PRIMARY KEY,
    next_at timestamptz NOT NULL
);

-- Drops the partitions of range `n` (ids from n million on). What has to be kept goes into the default
-- partition: the jobs of `kept`, those that wait or run now, and those that had an outcome after number
-- `seen`, when the caller began to look who has to be kept.
--
-- Returns how many were kept. Null: nothing was done, since ids of this range are still being given out,
-- there is no such range, or more than `most` have to be kept.
--
-- Under the lock nobody reads or changes a body, so nobody retries a job that is about to go: an
-- operator's retry locks the body first. The caller sets lock_timeout: who comes later queues behind us.
CREATE FUNCTION triojobs.drop_range(n bigint, kept bigint[], seen bigint, most int) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    width   CONSTANT bigint := 1000000;
    low     CONSTANT bigint := drop_range.n * width;
    high    CONSTANT bigint := (drop_range.n + 1) * width;
    space   CONSTANT text := (SELECT relnamespace::regnamespace::text FROM pg_class
                              WHERE oid = 'triojobs.jobs'::regclass);
    stay    bigint[];
    parent  text;
BEGIN
    IF (SELECT last_value FROM triojobs.job_ids) < high THEN
        RETURN NULL;
    END IF;
    LOCK TABLE ONLY triojobs.jobs, ONLY triojobs.outcomes IN ACCESS EXCLUSIVE MODE;
    -- A range whose jobs or outcomes lie in the default partition goes row by row.
    IF to_regclass(format('%s.%I', space, 'jobs_' || drop_range.n)) IS NULL
       OR to_regclass(format('%s.%I', space, 'outcomes_' || drop_range.n)) IS NULL THEN
        RETURN NULL;
    END IF;
    stay := ARRAY(
        SELECT unnest(drop_range.kept)
        UNION SELECT r.id FROM triojobs.ready r WHERE r.id >= low AND r.id < high
        UNION SELECT s.id FROM triojobs.scheduled s WHERE s.id >= low AND s.id < high
        UNION SELECT l.id FROM triojobs.leases l WHERE l.id >= low AND l.id < high
        UNION SELECT o.job_id FROM triojobs.outcomes o
              WHERE o.no > drop_range.seen AND o.job_id >= low AND o.job_id < high
    );
    IF cardinality(stay) > drop_range.most THEN
        RETURN NULL;
    END IF;
    FOREACH parent IN ARRAY ARRAY['jobs', 'outcomes'] LOOP
        EXECUTE format('ALTER TABLE %1$s.%2$I DETACH PARTITION %1$s.%3$I',
            space, parent, parent || '_' || drop_range.n);
    END LOOP;
    EXECUTE format('INSERT INTO %1$s.jobs SELECT * FROM %1$s.%2$I WHERE id = ANY ($1)',
        space, 'jobs_' || drop_range.n) USING stay;
    EXECUTE format('INSERT INTO %1$s.outcomes SELECT * FROM %1$s.%2$I WHERE job_id = ANY ($1)',
        space, 'outcomes_' || drop_range.n) USING stay;
    EXECUTE format('DROP TABLE %1$s.%2$I, %1$s.%3$I',
        space, 'jobs_' || drop_range.n, 'outcomes_' || drop_range.n);
    RETURN cardinality(stay);
END $$;
