/*
 * Threads that go through the same steps together. Between steps each waits for the others: first by looking again
 * and again, for a step of a few microseconds is over sooner than the kernel wakes a thread up; then by sleeping, where
 * others have not got a core. What a step has to do is dealt out piece by piece: a thread that is held up does less.
 */
#include <stdatomic.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define LOOKS 1000				/* some tens of microseconds */

struct team
{
	int			threads;
	_Alignas(64) atomic_int arrived;
	_Alignas(64) atomic_uint step;
	atomic_int	asleep;
	_Alignas(64) atomic_long next;	/* piece of this step */
};

static inline void
glance(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static inline long
take_piece(struct team *team)
{
	return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
}

/* Returns when all threads have called it; the next step's pieces begin at 0. */
static void
end_step(struct team *team)
{
	unsigned	step = atomic_load_explicit(&team->step, memory_order_relaxed);

	if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->threads)
	{
		atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
		atomic_store_explicit(&team->next, 0, memory_order_relaxed);
		atomic_store(&team->step, step + 1);
#ifdef __linux__
		if (atomic_load(&team->asleep) > 0)
			syscall(SYS_futex, &team->step, FUTEX_WAKE_PRIVATE, team->threads, NULL, NULL, 0);
#endif
		return;
	}
	for (int looks = 0; atomic_load_explicit(&team->step, memory_order_acquire) == step; looks++)
	{
		if (looks < LOOKS)
		{
			glance();
			continue;
		}
#ifdef __linux__
		atomic_fetch_add(&team->asleep, 1);
		syscall(SYS_futex, &team->step, FUTEX_WAIT_PRIVATE, step, NULL, NULL, 0);
		atomic_fetch_sub(&team->asleep, 1);
#else
		sched_yield();
#endif
	}
}
