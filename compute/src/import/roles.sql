-- Run once in an imported cluster, as superuser `postgres`, with search_path = pg_catalog. No superuser but `postgres`
-- remains who could log in, and nobody can become one.
DO $ebb$
DECLARE
  statement text;
  may_create_roles text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'CREATEROLE' ELSE 'NOCREATEROLE' END;
BEGIN
  FOR statement IN
    SELECT CASE WHEN oid = 10 THEN format('ALTER ROLE %I NOLOGIN PASSWORD NULL', rolname)
                ELSE format('ALTER ROLE %I NOSUPERUSER', rolname) END
    FROM pg_authid WHERE rolsuper AND rolname <> 'postgres'
  LOOP EXECUTE statement; END LOOP;

  IF EXISTS (SELECT FROM pg_authid WHERE rolname = 'app') THEN
    EXECUTE format('ALTER ROLE app LOGIN CREATEDB %s CONNECTION LIMIT -1 VALID UNTIL ''infinity''', may_create_roles);
  ELSE
    EXECUTE format('CREATE ROLE app LOGIN CREATEDB %s', may_create_roles);
  END IF;

  -- Up to 15, CREATEROLE is a way to any program of the machine; see the template's owner role.
  FOR statement IN
    SELECT format('ALTER ROLE %I NOREPLICATION%s', rolname,
                  CASE WHEN rolcreaterole AND may_create_roles = 'NOCREATEROLE' THEN ' NOCREATEROLE' ELSE '' END)
    FROM pg_authid WHERE NOT rolsuper AND rolname !~ '^pg_' AND (rolreplication OR rolcreaterole)
  LOOP EXECUTE statement; END LOOP;

  FOR statement IN
    SELECT DISTINCT format('REVOKE %I FROM %I GRANTED BY %I CASCADE', r.rolname, m.rolname, g.rolname)
    FROM pg_auth_members a JOIN pg_authid r ON r.oid = a.roleid JOIN pg_authid m ON m.oid = a.member
      JOIN pg_authid g ON g.oid = a.grantor
    WHERE (r.rolsuper OR r.rolname IN ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'))
      AND NOT m.rolsuper
  LOOP EXECUTE statement; END LOOP;

  -- The owner may do whatever the roles of the app may.
  FOR statement IN
    SELECT format('GRANT %I TO app', rolname) FROM pg_authid r
    WHERE NOT rolsuper AND rolname !~ '^pg_' AND rolname <> 'app' AND NOT pg_has_role(r.oid, 'app', 'MEMBER')
      AND NOT EXISTS (SELECT FROM pg_auth_members a WHERE a.roleid = r.oid AND a.member = 'app'::regrole)
  LOOP EXECUTE statement; END LOOP;

  FOR statement IN
    SELECT format('ALTER DATABASE %I OWNER TO app', datname) FROM pg_database d JOIN pg_authid r ON r.oid = d.datdba
    WHERE r.rolsuper AND NOT datistemplate AND datname <> 'postgres'
  LOOP EXECUTE statement; END LOOP;
END $ebb$;

-- Settings that would reach the sessions of a superuser, and libraries that are loaded into any.
SET allow_system_table_mods = on;
DELETE FROM pg_db_role_setting WHERE setrole IN (SELECT oid FROM pg_authid WHERE rolsuper)
  OR setrole = 0 AND setdatabase = (SELECT oid FROM pg_database WHERE datname = 'postgres');
UPDATE pg_db_role_setting SET setconfig = ARRAY(SELECT s FROM unnest(setconfig) s
  WHERE s !~* '^(session_preload_libraries|local_preload_libraries)=' AND NOT (setrole = 0 AND setdatabase = 0 AND s ~* '^search_path='));
DELETE FROM pg_db_role_setting WHERE setconfig = '{}';
UPDATE pg_subscription SET subenabled = false WHERE subenabled;
RESET allow_system_table_mods;
