/*
 * Attention of texts whose tokens stand one after another: each text's tokens look at one another, head by head, and
 * no matrix of all scores is ever made. torch takes one text at a time, and copies what comes in and goes out.
 *
 * A text and a head are one piece of work: keys and values are copied side by side (keys transposed), then a few
 * queries at a time get their scores, the softmax of them (Milakov and Gimelshein 2018 defer the division as here) and
 * their sum of values. What a text gets depends on that text alone, whatever stands beside it.
 *
 * Called through ctypes by autoembed.network, which checks shapes.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"

struct attention
{
	const float *joined;		/* tokens x (3 x heads x size): query, key and value side by side */
	float	   *seen;			/* tokens x (heads x size) */
	const int64_t *starts;		/* a text's first token; one more than there are texts */
	const float *biases;		/* heads x distances(longest): by how far the key is behind the query; or null */
	float	   *scratch;		/* a piece for each thread, autoembed_attention_scratch floats long */
};

#define CONCAT(name, suffix) name##suffix
#define NAMED(name, suffix) CONCAT(name, suffix)
#define INLINE static inline __attribute__((always_inline))
#define MOST_LANES 16
#define PADDING -1e30f		/* the score of a key that there is not: finite, or it would be NaN */
#define MOST_QUERIES 6

/* what the widest processor computes at once: the rest is there, but counts for nothing */
static long
padded(long length)
{
	return (length + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
}

/* from the farthest before to the farthest behind, and what a padded row reads beyond */
static long
distances(long longest)
{
	return 2 * longest - 1 + MOST_LANES;
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE
#endif
#endif

/* rows of `size` floats to columns; where there are no more rows the last one again */
static void
transpose(const float *from, long apart, long rows, long size, float *to, long stride)
{
#ifdef HAS_SHUFFLE
	typedef float four __attribute__((vector_size(4 * sizeof(float))));

	for (long row = 0; row < stride; row += 4)
		for (long i = 0; i < size; i += 4)
		{
			four		in[4];
			four		pairs[4];
			four		out[4];

			for (int r = 0; r < 4; r++)
				memcpy(&in[r], from + (row + r < rows ? row + r : rows - 1) * apart + i, sizeof(four));
			for (int r = 0; r < 4; r += 2)
			{
				pairs[r] = __builtin_shufflevector(in[r], in[r + 1], 0, 4, 1, 5);
				pairs[r + 1] = __builtin_shufflevector(in[r], in[r + 1], 2, 6, 3, 7);
			}
			for (int r = 0; r < 2; r++)
			{
				out[2 * r] = __builtin_shufflevector(pairs[r], pairs[r + 2], 0, 1, 4, 5);
				out[2 * r + 1] = __builtin_shufflevector(pairs[r], pairs[r + 2], 2, 3, 6, 7);
			}
			for (int r = 0; r < 4; r++)
				memcpy(to + (i + r) * stride + row, &out[r], sizeof(four));
		}
#else							/* gcc before 12 */
	for (long row = 0; row < stride; row++)
		for (long i = 0; i < size; i++)
			to[i * stride + row] = from[(row < rows ? row : rows - 1) * apart + i];
#endif
}

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define SUFFIX _avx512
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define LANES 16
#define QUERIES 6
#define WIDE 4
#include "attention_kernel.h"

#define SUFFIX _avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define QUERIES 6
#define WIDE 2
#include "attention_kernel.h"
#endif

#define SUFFIX _any
#define TARGET
#define LANES 4
#define QUERIES 4
#define WIDE 2
#include "attention_kernel.h"

/* floats: keys, values, and the scores of a few queries */
long
autoembed_attention_scratch(long longest, long size)
{
	return padded(longest) * (2 * size + MOST_QUERIES);
}

int
autoembed_attention(const struct attention *a, long texts, long longest, long heads, long size, float scale, int threads)
{
	void		(*look) (const struct attention *, long text, long longest, long head, long heads, long size, float scale, float *scratch) = look_any;
	long		piece = autoembed_attention_scratch(longest, size);

	if (size % MOST_LANES != 0)
		return -1;
#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
	if (__builtin_cpu_supports("avx512f"))
		look = look_avx512;
	else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
		look = look_avx2;
#endif
#pragma omp parallel num_threads(threads)
	{
		float	   *scratch = a->scratch + omp_get_thread_num() * piece;

#pragma omp for schedule(dynamic, 1)
		for (long work = texts * heads - 1; work >= 0; work--)	/* the last texts are the longest: batches are sorted */
			look(a, work / heads, longest, work % heads, heads, size, scale, scratch);
	}
	return 0;
}
