-- Run in each database of an imported cluster, as superuser, with search_path = pg_catalog.
--
-- What superusers own becomes the owner role's, so that no function, view or trigger runs as superuser for a tenant.
-- Members of extensions stay as they are: dropping and altering those stays a superuser's business.
DO $ebb$
DECLARE
  supers oid[] := (SELECT array_agg(oid) FROM pg_authid WHERE rolsuper);
  statement text;
BEGIN
  CREATE TEMPORARY TABLE ebb_members ON COMMIT DROP AS
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e';

  FOR statement IN
    SELECT format('ALTER EVENT TRIGGER %I DISABLE', evtname) FROM pg_event_trigger WHERE evtenabled <> 'D'
  LOOP EXECUTE statement; END LOOP;

  -- Functions in languages that are not trusted can do what the server's own user can; nobody but superusers may call
  -- those that no extension has brought.
  FOR statement IN
    SELECT format('ALTER ROUTINE %s OWNER TO postgres', p.oid::regprocedure)
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE p.oid >= 16384 AND NOT l.lanpltrusted AND p.prokind <> 'a'
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)
    UNION ALL
    SELECT format('REVOKE ALL ON ROUTINE %s FROM %s CASCADE', p.oid::regprocedure,
                  CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(g.grantee::regrole::text) END)
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang,
      LATERAL (SELECT DISTINCT grantee FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner)))) g
    WHERE p.oid >= 16384 AND NOT l.lanpltrusted AND p.prokind <> 'a' AND g.grantee <> ALL (supers)
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)
  LOOP EXECUTE statement; END LOOP;

  FOR statement IN
    SELECT format('ALTER SCHEMA %I OWNER TO app', nspname) FROM pg_namespace n
    WHERE nspowner = ANY (supers) AND (oid >= 16384 OR nspname = 'public')
      AND nspname !~ '^pg_' AND nspname <> 'information_schema'
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_namespace'::regclass AND m.objid = n.oid)
  LOOP EXECUTE statement; END LOOP;

  -- Sequences that belong to a column, indexes, toast tables and row types follow their tables.
  FOR statement IN
    SELECT format('ALTER %s %s OWNER TO app',
                  CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW'
                               WHEN 'f' THEN 'FOREIGN TABLE' WHEN 'c' THEN 'TYPE' ELSE 'TABLE' END,
                  CASE relkind WHEN 'c' THEN reltype::regtype::text ELSE c.oid::regclass::text END)
    FROM pg_class c
    WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c') AND relowner = ANY (supers) AND c.oid >= 16384
      AND relpersistence <> 't'
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid <> 0
                      AND relkind = 'S' AND d.deptype IN ('a', 'i'))
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_class'::regclass AND m.objid = c.oid)
  LOOP EXECUTE statement; END LOOP;

  FOR statement IN
    SELECT format('ALTER TYPE %s OWNER TO app', t.oid::regtype) FROM pg_type t
    WHERE typowner = ANY (supers) AND t.oid >= 16384
      AND (typtype IN ('d', 'e', 'r') OR typtype = 'b' AND typelem = 0)
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_type'::regclass AND m.objid = t.oid)
    UNION ALL
    SELECT format('ALTER %s %s OWNER TO app', CASE prokind WHEN 'a' THEN 'AGGREGATE' ELSE 'ROUTINE' END,
                  CASE prokind WHEN 'a' THEN format('%s(%s)', proname_in_schema, pg_get_function_identity_arguments(oid))
                               ELSE oid::regprocedure::text END)
    FROM (SELECT p.*, format('%I.%I', n.nspname, p.proname) AS proname_in_schema
          FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
          WHERE proowner = ANY (supers) AND p.oid >= 16384 AND (l.lanpltrusted OR p.prokind = 'a')
            AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)) p
    UNION ALL
    SELECT format('ALTER STATISTICS %I.%I OWNER TO app', nspname, stxname)
    FROM pg_statistic_ext JOIN pg_namespace n ON n.oid = stxnamespace WHERE stxowner = ANY (supers)
    UNION ALL
    SELECT format('ALTER COLLATION %I.%I OWNER TO app', nspname, collname)
    FROM pg_collation c JOIN pg_namespace n ON n.oid = collnamespace
    WHERE collowner = ANY (supers) AND c.oid >= 16384
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_collation'::regclass AND m.objid = c.oid)
    UNION ALL
    SELECT format('ALTER TEXT SEARCH CONFIGURATION %I.%I OWNER TO app', nspname, cfgname)
    FROM pg_ts_config c JOIN pg_namespace n ON n.oid = cfgnamespace
    WHERE cfgowner = ANY (supers) AND c.oid >= 16384
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_ts_config'::regclass AND m.objid = c.oid)
    UNION ALL
    SELECT format('ALTER TEXT SEARCH DICTIONARY %I.%I OWNER TO app', nspname, dictname)
    FROM pg_ts_dict c JOIN pg_namespace n ON n.oid = dictnamespace
    WHERE dictowner = ANY (supers) AND c.oid >= 16384
      AND NOT EXISTS (SELECT FROM ebb_members m WHERE m.classid = 'pg_ts_dict'::regclass AND m.objid = c.oid)
    UNION ALL
    SELECT format('ALTER LARGE OBJECT %s OWNER TO app', oid) FROM pg_largeobject_metadata WHERE lomowner = ANY (supers)
  LOOP EXECUTE statement; END LOOP;
END $ebb$;
