/*-------------------------------------------------------------------------
 *
 * autoembed_preload.c
 *	  Has the postmaster load embedding models, so that every process it
 *	  forks inherits them copy-on-write.
 *
 * Goes into shared_preload_libraries; EMBEDDING_PRELOAD in the server's
 * environment names the models.  This library knows nothing of Python: it has
 * PL/Python run a DO block before the first fork.  Whatever goes wrong is a
 * WARNING, and the server starts.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/ipc.h"
#include "utils/memutils.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

/* As autoembed.start() of the extension, but for the postmaster. */
#define LOAD_MODELS \
	"import site, sys\n" \
	"path = \"" AUTOEMBED_SITE "\"\n" \
	"sys.path[:] = [path, *(p for p in sys.path if p not in (path, \"\", site.getusersitepackages()))]\n" \
	"from autoembed.server.postmaster import start\n" \
	"start(GD, plpy.log, plpy.warning, api_version=1)\n"

static pid_t postmaster;

/* Of Python's C interface; PyObject and PyFrameObject are void here. */
typedef int (*Profiler) (void *self, void *frame, int what, void *arg);
static void (*python_before_fork) (void);
static void (*python_after_fork) (void);
static void (*python_set_profile) (Profiler, void *);

static bool
is_blank(const char *text)
{
	return text == NULL || text[strspn(text, ", \t")] == '\0';
}

static void
run_block(const char *source)
{
	PGFunction	handler = (PGFunction) load_external_function("$libdir/plpython3", "plpython3_inline_handler",
															  true, NULL);
	InlineCodeBlock *block = makeNode(InlineCodeBlock);

	block->source_text = pstrdup(source);
	block->langOid = InvalidOid;
	block->langIsTrusted = false;
	block->atomic = true;
	DirectFunctionCall1(handler, PointerGetDatum(block));
}

static void
report(int elevel, const ErrorData *error)
{
	ereport(elevel,
			(errcode(error->sqlerrcode),
			 errmsg("no embedding model was preloaded: %s", error->message),
			 error->detail ? errdetail_internal("%s", error->detail) : 0,
			 error->hint ? errhint("%s", error->hint) : 0,
			 error->context ? errcontext("%s", error->context) : 0));
}

/*
 * There is no transaction in the postmaster: PL/Python and SPI get a memory
 * context to take for one's.  An error must not leave its SPI connection
 * behind, which every child would inherit and complain about.  It becomes a
 * message of the given level.
 */
static void
try_block(const char *source, int elevel)
{
	MemoryContext former = CurrentMemoryContext;
	MemoryContext own = AllocSetContextCreate(TopMemoryContext, "autoembed_preload", ALLOCSET_DEFAULT_SIZES);

	TopTransactionContext = own;
	CurTransactionContext = own;
	MemoryContextSwitchTo(own);
	PG_TRY();
	{
		run_block(source);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(own);
		error = CopyErrorData();
		FlushErrorState();
		AtEOXact_SPI(false);
		report(elevel, error);
	}
	PG_END_TRY();
	TopTransactionContext = NULL;
	CurTransactionContext = NULL;
	MemoryContextSwitchTo(former);
	MemoryContextDelete(own);
}

/*
 * A Python that cannot start (a wrong PYTHONHOME, say) ends its process and
 * raises nothing.  So a child tries it first; what merely raises will do so
 * again in the postmaster.
 */
static bool
python_starts(void)
{
	int			status = -1;
	pid_t		child;

	fflush(NULL);
	child = fork();
	if (child == 0)
	{
		on_exit_reset();		/* the postmaster's lock files are not ours */
		MyProcPid = getpid();
		try_block("pass", DEBUG1);
		_exit(0);
	}
	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return true;
	ereport(WARNING,
			(errmsg("no embedding model was preloaded: Python does not start in the postmaster"),
			 errhint("What Python says about it stands before this in the server's log.")));
	return false;
}

/*
 * Python must be told of a fork, or what it has set up for one process goes on
 * in all of them: every session would draw the same random numbers.  Telling
 * it takes milliseconds and copies pages, which a connection that runs no
 * Python should not pay for: so not at the fork, but when a process first runs
 * Python.  Its profiler is what Python calls then, once.
 */
static int
tell_of_fork(void *self, void *frame, int what, void *arg)
{
	if (getpid() == postmaster)
		return 0;
	python_set_profile(NULL, NULL);
	python_before_fork();		/* takes the locks that the other renews */
	python_after_fork();
	return 0;
}

static void
watch_for_python(void)
{
	python_before_fork = (void (*) (void)) dlsym(RTLD_DEFAULT, "PyOS_BeforeFork");
	python_after_fork = (void (*) (void)) dlsym(RTLD_DEFAULT, "PyOS_AfterFork_Child");
	python_set_profile = (void (*) (Profiler, void *)) dlsym(RTLD_DEFAULT, "PyEval_SetProfile");
	postmaster = getpid();
	if (python_before_fork && python_after_fork && python_set_profile)
		python_set_profile(tell_of_fork, NULL);
	else
		ereport(WARNING,
				(errmsg("Python cannot be told of the server's forks, so all sessions will draw the same random numbers"),
				 errhint("This Python does not export PyEval_SetProfile: take autoembed_preload out of shared_preload_libraries.")));
}

#ifdef __GLIBC__
/*
 * The destructors of torch and the like would walk all that a process has
 * inherited, and so copy it: 80 ms at the end of every session.  By the time
 * that proc_exit() calls exit(), PostgreSQL's own callbacks have run.
 */
static void
skip_destructors(int status, void *arg)
{
	if (getpid() == postmaster || !proc_exit_inprogress)
		return;
	fflush(NULL);
	_exit(status);
}
#endif

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		return;
	if (!IsPostmasterEnvironment || IsUnderPostmaster || IsBinaryUpgrade)
		return;
	if (is_blank(getenv("EMBEDDING_PRELOAD")) || !python_starts())
		return;
	try_block(LOAD_MODELS, WARNING);
	watch_for_python();
#ifdef __GLIBC__
	on_exit(skip_destructors, NULL);	/* runs before what was registered earlier */
	malloc_trim(0);
#endif
}
