-- One of a user's init scripts, with an error.
select 1 / 0;
