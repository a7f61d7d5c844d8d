select pg_sleep(6);
