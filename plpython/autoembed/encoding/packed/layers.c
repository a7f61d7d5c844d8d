/*
 * The layers of an encoder on packed tokens: all texts' tokens in one matrix, each text's own one after another.
 * One call runs any number of layers, on a team of threads that meets between steps.
 *
 * Two ways through a layer:
 * - Few rows: each product is dealt out by its outputs, so that the weights are read once, by all threads together.
 *   That reading is what it costs. float32 goes this way always: its products are what it costs, at any size.
 * - Many rows, in bfloat16 or int8: a thread takes a stretch of rows through all that lies between two attentions, so
 *   that what goes from product to product stays in its cache.
 *
 * Numbers: between layers, sums, norms and activations are float32. What goes into a product is float32, bfloat16 or
 * bytes by the network's type. A row x of bytes is held as b * scale + least with b from 0 to 255, and a weight's
 * column as p * column_scale, so that a product is
 *     sum(b * p) * scale * column_scale + least * column_sum,    where column_sum = sum(p) * column_scale,
 * and sum(b * p) is exact in 32 bits. A few inputs of each product are far larger than all others and would make every
 * step as coarse as themselves: these outliers stay floats, their weights have no bytes.
 * What a row becomes depends on its own text alone, whatever else is in the matrix.
 *
 * Called through ctypes by layers.py, which checks shapes.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "team.h"

#define CONCAT(name, suffix) name##suffix
#define NAMED(name, suffix) CONCAT(name, suffix)
#define PUT_TOGETHER(name, suffix) name##suffix
#define JOINED_NAME(name, suffix) PUT_TOGETHER(name, suffix)
#define INLINE static inline __attribute__((always_inline))

#define PANEL 32				/* outputs that are packed side by side */
#define VECTORS 2				/* of a panel that a tile takes at once */
#define AHEAD 64				/* words of a panel that are asked for before they are needed: 8 kB */
#define UNIT 16					/* words: rows of words are this long, or a multiple, filled up with zeros */
#define MOST_TILE_ROWS 32		/* of any processor */
#define OUTLIERS 8
#define NO_KEY -1e30f			/* the score of a key that there is not: finite, or it would be NaN */
#define FEW_ROWS 64
#define STRETCH 96				/* rows that a thread takes through a layer: what they become fits into its cache */
#define STRETCH_OF_BYTES 48		/* their activations are floats for a while */

enum type {FLOATS, HALVES, BYTES};
enum activation {NONE, GELU, GELU_TANH, RELU, GELU_NEARLY};

struct product					/* a linear layer: outputs x inputs */
{
	const void *weights;		/* floats as they are published; else panels: [outputs / PANEL][words][PANEL] */
	const float *bias;
	const float *scales;		/* of bytes, as are the others below: a column's scale */
	const float *sums;
	const float *outlier_weights;	/* OUTLIERS x outputs */
	const int64_t *places;		/* of the outliers among the inputs */
	long		inputs;
	long		outputs;
};

struct norm
{
	const float *weight;
	const float *bias;
};

struct layer
{
	struct product joined[3];	/* query, key and value: three matrices, or one of all */
	long		parts;
	struct product output;
	struct product up;
	struct product down;
	struct norm attention_norm;
	struct norm norm;
};

struct embeddings
{
	const void *words;			/* vocabulary x width */
	const void *positions;		/* farthest x width */
	const float *kind;			/* added to all; or null */
	struct norm norm;
	long		halves;			/* the tables are bfloat16 */
	long		vocabulary;
	long		farthest;
	long		padding;		/* the token that takes no position, and whose number comes before all positions; or -1 */
};

struct network
{
	long		type;
	long		width;
	long		inner;
	long		heads;
	long		activation;
	double		epsilon;
	struct embeddings embeddings;
	const struct layer *layers;
};

struct batch
{
	const int64_t *ids;			/* of the tokens */
	float	   *tokens;			/* rows x width: what the layers give */
	long		rows;
	const int64_t *starts;		/* a text's first row; one more than there are texts */
	long		texts;
	long		longest;
	const float *biases;		/* heads x autoembed_distances(reach): by how far the key is behind the query; or null */
	long		reach;			/* at least `longest` */
	char	   *space;			/* autoembed_layers_space bytes */
	double	   *seconds;		/* of each stage, in the first thread; or null */
};

enum stage {EMBEDDINGS, JOINED, ATTENTION, OUTPUT, UP, DOWN, NORMS, NARROWING, WAITING, STAGES};

struct narrowed					/* rows as a product takes them */
{
	void	   *words;
	long		stride;			/* words from row to row */
	float	   *scales;			/* of bytes, as are the others */
	float	   *least;
	float	   *outliers;
};

struct finish					/* what a product's sums become */
{
	const struct product *product;
	struct narrowed rows;
	long		activation;
	const float *residual;		/* or null */
	long		residual_stride;
	float	   *floats;			/* one of both */
	uint16_t   *halves;
	long		stride;
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE
#endif
#endif
typedef int32_t four __attribute__((vector_size(16)));
#ifdef HAS_SHUFFLE
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else							/* gcc before 12 */
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (four) {i, j, k, l})
#endif

struct processor
{
	int			level;
	int			rows[3];		/* of a tile, by type */
	void		(*tile[3]) (const void *x, long stride, const void *panel, long depth, int rows, void *sums, const char *coming, long pace);
	void		(*dot_tile) (const float *x, long stride, const float *weights, long depth, int rows, long outputs, float *sums);
	void		(*finish) (const struct finish *f, const void *sums, long row, int rows, long output);
	void		(*embed) (const void *word, const void *position, long halves, const float *kind, float *to, long count);
	void		(*normalize) (float *values, const float *weight, const float *bias, float epsilon, long count);
	void		(*narrow) (const float *values, long count, uint16_t *to, long room);
	void		(*quantize) (float *values, long count, const int64_t *places, uint8_t *to, long room, float *scale, float *least, float *outliers);
	float		(*softmax) (float *scores, long apart, const float *biases, float scale, long keys, float *floats, uint16_t *halves);
	void		(*weigh) (const float *sums, float weight, float *to, long count);
	void		(*transpose) (const int32_t *from, long apart, long rows, long depth, int32_t *to);
	void		(*pair) (const uint16_t *from, long apart, long rows, long count, int32_t *to);
};

static void
tile_bytes_any(const void *x, long stride, const void *panel, long depth, int rows, void *sums, const char *coming, long pace)
{
	(void) coming;
	(void) pace;
	for (int r = 0; r < rows; r++)
		for (int o = 0; o < PANEL; o++)
		{
			const uint8_t *row = (const uint8_t *) ((const int32_t *) x + r * stride);
			const int8_t *column = (const int8_t *) ((const int32_t *) panel + o);
			int32_t		sum = 0;

			for (long k = 0; k < depth; k++)
				for (int i = 0; i < 4; i++)
					sum += row[4 * k + i] * column[4 * k * PANEL + i];
			((int32_t *) sums)[r * PANEL + o] = sum;
		}
}

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define X86
#include <cpuid.h>
#include <immintrin.h>

#define SUFFIX _512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define WIDTH 512
#include "lanes.h"
#include "processor.h"

#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define TILE tile_bytes_512
#define TILE_ROWS 12
#define VECTOR words
#define FACTOR words
#define ZERO _mm512_setzero_si512()
#define MULTIPLY_ADD(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#define SPREAD(word) spread_word(word)
#define FETCH(from) fetch_words(from)
#define KEEP(to, values) memcpy(to, &(values), sizeof(words))
#include "tile.h"

#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define TILE tile_pairs_512
#define TILE_ROWS 12
#define VECTOR lanes
#define FACTOR words
#define ZERO splat(0.0f)
#define MULTIPLY_ADD(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh) (a), (__m512bh) (b))
#define SPREAD(word) spread_word(word)
#define FETCH(from) fetch_words(from)
#define KEEP(to, values) store((float *) (to), values)
#include "tile.h"
#include "lanes.h"

#define SUFFIX _256
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 256
#include "lanes.h"
#include "processor.h"

#undef TARGET
#define TARGET __attribute__((target("avxvnni,avx2,fma")))
#define TILE tile_bytes_256
#define TILE_ROWS 6
#define VECTOR words
#define FACTOR words
#define ZERO _mm256_setzero_si256()
#define MULTIPLY_ADD(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#define SPREAD(word) spread_word(word)
#define FETCH(from) fetch_words(from)
#define KEEP(to, values) memcpy(to, &(values), sizeof(words))
#include "tile.h"
#include "lanes.h"

/*
 * AMX: tiles of 16 rows by 16 words. gcc's own intrinsics do not tell the compiler what they read and write, so that it
 * would leave out or move what fills the memory before: these do.
 */
#if __GNUC__ >= 11
#define HAS_AMX
#define AMX __attribute__((target("amx-tile,amx-int8,amx-bf16")))
#define FETCH_TILE(tile, from, apart) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(apart):"memory")
#define KEEP_TILE(tile, to, apart) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"::"r"(to), "r"(apart):"memory")
#define CLEAR_TILE(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define MULTIPLY_BYTES(sum, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)
#define MULTIPLY_PAIRS(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

/* reads 16 or 32 rows, and gives as many: those beyond `rows` are anything */
#define DEFINE_AMX_TILE(name, MULTIPLY)																		\
AMX static void																								\
name(const void *x, long stride, const void *panel, long depth, int rows, void *sums, const char *coming, long pace)	\
{																											\
	const int32_t *row = x;																					\
	const int32_t *column = panel;																			\
	char	   *out = sums;																					\
	long		apart = stride * 4;																			\
	long		wide = PANEL * 4;																			\
																											\
	CLEAR_TILE(0);																							\
	CLEAR_TILE(1);																							\
	if (rows <= 16)																							\
	{																										\
		for (long k = 0; k < depth; k += UNIT)																\
		{																									\
			for (long line = 0; line < pace; line++, coming += 64)											\
				__builtin_prefetch(coming, 0, 2);																\
			FETCH_TILE(4, row + k, apart);																	\
			FETCH_TILE(6, column + k * PANEL, wide);														\
			FETCH_TILE(7, column + k * PANEL + 16, wide);													\
			MULTIPLY(0, 4, 6);																				\
			MULTIPLY(1, 4, 7);																				\
		}																									\
	}																										\
	else																									\
	{																										\
		CLEAR_TILE(2);																						\
		CLEAR_TILE(3);																						\
		for (long k = 0; k < depth; k += UNIT)																\
		{																									\
			for (long line = 0; line < pace; line++, coming += 64)											\
				__builtin_prefetch(coming, 0, 2);																\
			FETCH_TILE(4, row + k, apart);																	\
			FETCH_TILE(6, column + k * PANEL, wide);														\
			MULTIPLY(0, 4, 6);																				\
			FETCH_TILE(7, column + k * PANEL + 16, wide);													\
			MULTIPLY(1, 4, 7);																				\
			FETCH_TILE(5, row + 16 * stride + k, apart);													\
			MULTIPLY(2, 5, 6);																				\
			MULTIPLY(3, 5, 7);																				\
		}																									\
		KEEP_TILE(2, out + 16 * PANEL * 4, wide);															\
		KEEP_TILE(3, out + 16 * PANEL * 4 + 64, wide);														\
	}																										\
	KEEP_TILE(0, out, wide);																				\
	KEEP_TILE(1, out + 64, wide);																			\
}

DEFINE_AMX_TILE(tile_bytes_amx, MULTIPLY_BYTES)
DEFINE_AMX_TILE(tile_pairs_amx, MULTIPLY_PAIRS)
#endif
#endif

#define SUFFIX _128
#define TARGET
#define WIDTH 128
#include "lanes.h"
#include "processor.h"
#include "lanes.h"

/* --- which processor this is ------------------------------------------------------------------------------------- */

enum level {ANY, AVX2, AVX512, DOTS, AMX_TILES};	/* what each has, those after it have too */

static const struct processor any = {
	ANY, {4, 3, 1}, {tile_floats_128, tile_halves_128, tile_bytes_any},
	dot_tile_128, finish_sums_128, embed_128, normalize_128, narrow_128, quantize_128, softmax_128, weigh_128, transpose_128, pair_128
};
static struct processor chosen;

#ifdef X86
static int
supported(void)
{
	unsigned	a;
	unsigned	b;
	unsigned	c;
	unsigned	d;
	int			level = ANY;

	if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
		return level;
	level = AVX2;
	if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
		return level;
	level = AVX512;
	if (!__builtin_cpu_supports("avx512vnni"))
		return level;
	level = DOTS;
#ifdef HAS_AMX
	if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 22) && (d & 1u << 24) && (d & 1u << 25)
		&& syscall(SYS_arch_prctl, 0x1023, 18) == 0)	/* ARCH_REQ_XCOMP_PERM, of the tiles' data: once for a process and its children */
		level = AMX_TILES;
#endif
	return level;
}

static int
has_avx_vnni(void)
{
	unsigned	a;
	unsigned	b;
	unsigned	c;
	unsigned	d;

	return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

static int
has_bfloat16(void)
{
	unsigned	a;
	unsigned	b;
	unsigned	c;
	unsigned	d;

	return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif

/* At most this level: tests try each. Returns the one that it is. */
int
autoembed_processor(int most)
{
	chosen = any;
#ifdef X86
	int			level = supported();

	if (level > most)
		level = most;
	if (level >= AVX512)
		chosen = (struct processor) {
			AVX512, {12, 6, 1}, {tile_floats_512, tile_halves_512, tile_bytes_any},
			dot_tile_512, finish_sums_512, embed_512, normalize_512, narrow_512, quantize_512, softmax_512, weigh_512, transpose_512, pair_512
		};
	else if (level == AVX2)
		chosen = (struct processor) {
			AVX2, {6, 3, 1}, {tile_floats_256, tile_halves_256, tile_bytes_any},
			dot_tile_256, finish_sums_256, embed_256, normalize_256, narrow_256, quantize_256, softmax_256, weigh_256, transpose_256, pair_256
		};
	if (level == AVX2 && has_avx_vnni())
	{
		chosen.rows[BYTES] = 6;
		chosen.tile[BYTES] = tile_bytes_256;
	}
	if (level >= DOTS)
	{
		chosen.rows[BYTES] = 12;
		chosen.tile[BYTES] = tile_bytes_512;
	}
	if (level >= DOTS && has_bfloat16())
	{
		chosen.rows[HALVES] = 12;
		chosen.tile[HALVES] = tile_pairs_512;
	}
#ifdef HAS_AMX
	if (level >= AMX_TILES)
	{
		chosen.rows[BYTES] = chosen.rows[HALVES] = 32;
		chosen.tile[BYTES] = tile_bytes_amx;
		chosen.tile[HALVES] = tile_pairs_amx;
	}
#endif
	chosen.level = level;
#endif
	return chosen.level;
}

/* AMX's registers are shaped once for each thread, and given back: what a thread has in them is saved at each switch. */
static void
shape_tiles(void)
{
#ifdef HAS_AMX
	static const struct
	{
		uint8_t		palette;
		uint8_t		start;
		uint8_t		reserved[14];
		uint16_t	bytes[16];
		uint8_t		rows[16];
	}			shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

	if (chosen.level >= AMX_TILES)
		__asm__ volatile("ldtilecfg %0"::"m"(shape));
#endif
}

static void
release_tiles(void)
{
#ifdef HAS_AMX
	if (chosen.level >= AMX_TILES)
		__asm__ volatile("tilerelease");
#endif
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static long
rounded(long number, long unit)
{
	return (number + unit - 1) / unit * unit;
}

/* words that hold so many numbers */
static long
words_of(long type, long numbers)
{
	return type == FLOATS ? numbers : rounded((numbers * (type == HALVES ? 2 : 1) + 3) / 4, UNIT);
}

static long
stretch_of(const struct network *n)
{
	return n->type == BYTES && chosen.level < AMX_TILES ? STRETCH_OF_BYTES : STRETCH;
}

/* Attention multiplies bfloat16 where that is quicker, and heads are as long as its tiles. */
static long
attention_type(const struct network *n)
{
	return n->type != FLOATS && n->width / n->heads % 32 == 0 && chosen.tile[HALVES] != NULL && chosen.rows[HALVES] > 6 ? HALVES : FLOATS;
}

struct run						/* of one call */
{
	const struct network *network;
	const struct batch *batch;
	struct team team;
	long		type;
	long		attention;		/* type of number */
	int64_t    *positions;
	void	   *joined;
	float	   *seen;
	float	   *inner;
	struct narrowed narrow;		/* rows for a product of `width` inputs */
	struct narrowed narrow_inner;
	char	   *scratch;		/* a piece for each thread */
	long		piece;
};

static void *
place(char **space, long bytes)
{
	char	   *here = *space;

	*space += rounded(bytes, 64);
	return here;
}

static struct narrowed
place_rows(char **space, long type, long rows, long width)
{
	struct narrowed narrow;

	rows = rounded(rows, MOST_TILE_ROWS) + MOST_TILE_ROWS;	/* tiles read on */
	narrow.stride = words_of(type, width);
	narrow.words = place(space, rows * narrow.stride * 4);
	narrow.scales = type == BYTES ? place(space, rows * sizeof(float)) : NULL;
	narrow.least = type == BYTES ? place(space, rows * sizeof(float)) : NULL;
	narrow.outliers = type == BYTES ? place(space, rows * OUTLIERS * sizeof(float)) : NULL;
	return narrow;
}

/* What a product writes as bfloat16 ends where its outputs do: what is left of a row's last words must be no NaN. */
static void
clear_padding(const struct narrowed *narrow, long rows, long width)
{
	long		all = narrow->stride * 2;

	for (long row = 0; row < rows && all > width; row++)
		memset((uint16_t *) narrow->words + row * all + width, 0, (all - width) * sizeof(uint16_t));
}

/* of a thread: the larger of what it needs for attention, for a packed panel and for a stretch */
static long
piece_of(const struct network *n, long longest)
{
	long		size = n->width / n->heads;
	long		keys = rounded(longest, PANEL);
	long		rows = chosen.rows[attention_type(n)];
	long		attention = keys * rounded(size, PANEL) * 4 * 2 + rows * keys * 4 * 2 + 4 * 64;
	long		panel = n->type == FLOATS ? (n->width > n->inner ? n->width : n->inner) * PANEL * 4 : 0;
	char	   *stretch = NULL;
	long		sums = MOST_TILE_ROWS * PANEL * 4;

	if (n->type != FLOATS)
	{
		place_rows(&stretch, n->type, stretch_of(n), n->width);
		place_rows(&stretch, n->type, stretch_of(n), n->inner);
		place(&stretch, stretch_of(n) * n->inner * sizeof(float));
	}
	if (panel > attention)
		attention = panel;
	if (stretch - (char *) NULL > attention)
		attention = stretch - (char *) NULL;
	return rounded(attention + sums, 4096);
}

static char *
place_all(struct run *run, char *space, long rows, long longest, int threads)
{
	const struct network *n = run->network;
	long		few = n->type == FLOATS || rows <= FEW_ROWS ? rows : 0;

	space = (char *) rounded((long) space, 64);
	run->positions = place(&space, rows * sizeof(int64_t));
	run->joined = place(&space, (rows + MOST_TILE_ROWS) * 3 * n->width * (run->attention == HALVES ? 2 : 4));
	run->seen = place(&space, rows * n->width * sizeof(float));
	run->inner = place(&space, few * n->inner * sizeof(float));
	if (n->type != FLOATS)
	{
		run->narrow = place_rows(&space, n->type, few, n->width);
		run->narrow_inner = place_rows(&space, n->type, few, n->inner);
	}
	run->piece = piece_of(n, longest);
	run->scratch = place(&space, run->piece * threads);
	return space;
}

long
autoembed_layers_space(const struct network *n, long rows, long longest, int threads)
{
	struct run	run = {.network = n};

	run.attention = attention_type(n);
	return place_all(&run, NULL, rows, longest, threads) - (char *) NULL + 64;
}

/* from the farthest before to the farthest behind, and what a padded row reads beyond */
long
autoembed_distances(long reach)
{
	return 2 * reach - 1 + PANEL;
}

/* --- steps ------------------------------------------------------------------------------------------------------- */

#define EACH_PIECE(number, team, count) for (long number = take_piece(team); number < (count); number = take_piece(team))

static double
clock_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

struct thread
{
	struct run *run;
	char	   *scratch;
	int32_t    *sums;			/* of a tile */
	double		since;
	double	   *seconds;		/* or null */
};

static void
count_time(struct thread *t, enum stage stage)
{
	if (t->seconds)
	{
		double		now = clock_now();

		t->seconds[stage] += now - t->since;
		t->since = now;
	}
}

static void
meet(struct thread *t)
{
	end_step(&t->run->team);
	count_time(t, WAITING);
}

/* some rows, from `first` on, times some panels of a product */
static void
multiply(struct thread *t, const struct finish *f, long type, long first, long rows, long panel, long panels)
{
	const struct product *p = f->product;
	long		most = chosen.rows[type];
	long		depth = f->rows.stride;
	long		size = depth * PANEL * 4;
	long		pace = (PANEL * UNIT * 4 / 64 * most + rows - 1) / rows;

	for (; panels > 0; panel++, panels--)
	{
		const char *weights = (const char *) p->weights + panel * size;
		const char *coming = weights + size;

		for (long row = first; row < first + rows; row += most, coming += depth / UNIT * pace * 64)
		{
			int			some = first + rows - row < most ? first + rows - row : most;

			chosen.tile[type] ((const int32_t *) f->rows.words + row * depth, depth, weights, depth, some, t->sums, coming, panels > 1 ? pace : 0);
			chosen.finish(f, t->sums, row, some, panel * PANEL);
		}
	}
}

/* the same of floats as they are published: few rows as they are, many by packing the panel first */
static void
multiply_published(struct thread *t, const struct finish *f, long rows, long panel)
{
	const struct product *p = f->product;
	const float *weights = (const float *) p->weights + panel * PANEL * p->inputs;
	long		outputs = p->outputs - panel * PANEL < PANEL ? p->outputs - panel * PANEL : PANEL;
	long		most = chosen.rows[FLOATS];

	if (rows > FEW_ROWS)
		chosen.transpose((const int32_t *) weights, p->inputs, outputs, p->inputs, (int32_t *) t->scratch);
	for (long row = 0; row < rows; row += most)
	{
		const float *x = (const float *) f->rows.words + row * f->rows.stride;
		int			some = rows - row < most ? rows - row : most;

		if (rows > FEW_ROWS)
			chosen.tile[FLOATS] (x, f->rows.stride, t->scratch, p->inputs, some, t->sums, NULL, 0);
		else
			chosen.dot_tile(x, f->rows.stride, weights, p->inputs, some, outputs, (float *) t->sums);
		chosen.finish(f, t->sums, row, some, panel * PANEL);
	}
}

/* all rows times all of a product, dealt out by its panels */
static void
multiply_all(struct thread *t, const struct finish *f, long piece, long panel_count)
{
	if (t->run->type == FLOATS)
		multiply_published(t, f, t->run->batch->rows, piece);
	else
		multiply(t, f, t->run->type, 0, t->run->batch->rows, piece, panel_count);
}

static long
panels_of(const struct product *p)
{
	return (p->outputs + PANEL - 1) / PANEL;
}

static void
deal_product(struct thread *t, const struct finish *f)
{
	EACH_PIECE(panel, &t->run->team, panels_of(f->product))
		multiply_all(t, f, panel, 1);
}

/* one row to what a product takes; in float32 it is that already */
static void
narrow_row(const struct run *run, float *values, long count, const struct product *after, const struct narrowed *to, long row)
{
	char	   *words = (char *) to->words + row * to->stride * 4;

	if (run->type == HALVES)
		chosen.narrow(values, count, (uint16_t *) words, to->stride * 2);
	else if (run->type == BYTES)
		chosen.quantize(values, count, after->places, (uint8_t *) words, to->stride * 4, to->scales + row, to->least + row, to->outliers + row * OUTLIERS);
}

static struct finish
joined_finish(const struct run *run, const struct product *part, long place, struct narrowed rows)
{
	struct finish f = {.product = part, .rows = rows};

	f.stride = 3 * run->network->width;
	if (run->attention == HALVES)
		f.halves = (uint16_t *) run->joined + place;
	else
		f.floats = (float *) run->joined + place;
	return f;
}

static struct finish
added_finish(const struct run *run, const struct product *product, struct narrowed rows, float *tokens)
{
	struct finish f = {.product = product, .rows = rows};

	f.stride = f.residual_stride = run->network->width;
	f.residual = f.floats = tokens;
	return f;
}

static struct finish
inner_finish(const struct run *run, const struct product *product, struct narrowed rows, float *floats, uint16_t *halves)
{
	struct finish f = {.product = product, .rows = rows, .activation = run->network->activation};

	if (run->type != FLOATS && f.activation == GELU)
		f.activation = GELU_NEARLY;
	f.stride = run->network->inner;
	if (run->type == HALVES)
		f.stride = words_of(HALVES, run->network->inner) * 2;
	f.floats = run->type == HALVES ? NULL : floats;
	f.halves = run->type == HALVES ? halves : NULL;
	return f;
}

/* --- attention --------------------------------------------------------------------------------------------------- */

/* one head of one text */
static void
look(struct thread *t, long text, long head)
{
	const struct run *run = t->run;
	const struct network *n = run->network;
	const struct batch *b = run->batch;
	long		type = run->attention;
	long		size = n->width / n->heads;
	long		start = b->starts[text];
	long		length = b->starts[text + 1] - start;
	long		panels = (length + PANEL - 1) / PANEL;
	long		stride = words_of(type, 3 * n->width);	/* of a token, in words */
	long		depth = type == HALVES ? size / 2 : size;
	long		keys_depth = type == HALVES ? rounded((length + 1) / 2, UNIT) : length;
	const int32_t *queries = (const int32_t *) run->joined + start * stride + head * depth;
	const int32_t *keys = queries + n->heads * depth;
	const int32_t *values = keys + n->heads * depth;
	const float *biases = b->biases ? b->biases + head * autoembed_distances(b->reach) + b->reach - 1 : NULL;
	char	   *space = t->scratch;
	int32_t    *packed_keys = place(&space, panels * PANEL * depth * 4);
	int32_t    *packed_values = place(&space, panels * PANEL * rounded(size, PANEL) * (type == HALVES ? 2 : 4));
	int			most = chosen.rows[type];
	float	   *scores = place(&space, most * panels * PANEL * 4);
	void	   *weights = place(&space, most * panels * PANEL * 4);
	float		scale = 1.0f / sqrtf(size);

	for (long panel = 0; panel < panels; panel++)
		chosen.transpose(keys + panel * PANEL * stride, stride, length - panel * PANEL, depth, packed_keys + panel * PANEL * depth);
	for (long from = 0; from < size; from += PANEL)
	{
		int32_t    *panel = packed_values + from / PANEL * PANEL * keys_depth;
		long		some = size - from < PANEL ? size - from : PANEL;

		if (type == HALVES)
		{
			long		pairs = (length + 1) / 2;

			chosen.pair((const uint16_t *) values + from, stride * 2, length, some, panel);
			memset(panel + pairs * PANEL, 0, (keys_depth - pairs) * PANEL * 4);
		}
		else
			for (long k = 0; k < length; k++)
				memcpy(panel + k * PANEL, values + k * stride + from, some * 4);
	}
	for (long row = 0; row < length; row += most)
	{
		int			rows = length - row < most ? length - row : most;
		float		weight[MOST_TILE_ROWS];
		long		wide = type == HALVES ? panels * PANEL / 2 : panels * PANEL;

		for (long panel = 0; panel < panels; panel++)
			chosen.tile[type] (queries + row * stride, stride, packed_keys + panel * PANEL * depth, depth, rows, scores + panel * PANEL * most, NULL, 0);
		for (int r = 0; r < rows; r++)
			weight[r] = chosen.softmax(scores + r * PANEL, PANEL * most, biases ? biases - row - r : NULL, scale, length,
									   (float *) weights + r * panels * PANEL, type == HALVES ? (uint16_t *) weights + r * panels * PANEL : NULL);
		for (long from = 0; from < size; from += PANEL)
		{
			chosen.tile[type] (weights, wide, packed_values + from / PANEL * PANEL * keys_depth, keys_depth, rows, t->sums, NULL, 0);
			for (int r = 0; r < rows; r++)
				chosen.weigh((const float *) t->sums + r * PANEL, weight[r], run->seen + (start + row + r) * n->width + head * size + from, size - from < PANEL ? size - from : PANEL);
		}
	}
}

static void
deal_attention(struct thread *t)
{
	const struct run *run = t->run;
	long		heads = run->network->heads;
	long		pieces = run->batch->texts * heads;

	EACH_PIECE(piece, &t->run->team, pieces)
	{
		long		work = pieces - 1 - piece;	/* the last texts are the longest: batches are sorted */

		look(t, work / heads, work % heads);
	}
	count_time(t, ATTENTION);
}

/* --- embeddings -------------------------------------------------------------------------------------------------- */

/* As in transformers: a padding token inside a text, which its text may spell out, takes no position. */
static int
number_tokens(const struct embeddings *e, const struct batch *b, int64_t *positions)
{
	for (long text = 0; text < b->texts; text++)
	{
		int64_t		next = e->padding < 0 ? 0 : e->padding + 1;

		for (long row = b->starts[text]; row < b->starts[text + 1]; row++)
		{
			positions[row] = b->ids[row] == e->padding ? e->padding : next++;
			if (b->ids[row] < 0 || b->ids[row] >= e->vocabulary || positions[row] >= e->farthest)
				return -1;
		}
	}
	return 0;
}

static void
deal_embeddings(struct thread *t)
{
	const struct network *n = t->run->network;
	const struct embeddings *e = &n->embeddings;
	const struct batch *b = t->run->batch;
	long		size = n->width * (e->halves ? 2 : 4);

	EACH_PIECE(row, &t->run->team, b->rows)
	{
		float	   *token = b->tokens + row * n->width;

		chosen.embed((const char *) e->words + b->ids[row] * size, (const char *) e->positions + t->run->positions[row] * size, e->halves, e->kind, token, n->width);
		chosen.normalize(token, e->norm.weight, e->norm.bias, n->epsilon, n->width);
	}
	count_time(t, EMBEDDINGS);
	meet(t);
}

/* --- few rows, or floats: product by product --------------------------------------------------------------------- */

static void
deal_narrowing(struct thread *t, float *values, long count, const struct product *after, const struct narrowed *to)
{
	EACH_PIECE(row, &t->run->team, t->run->batch->rows)
		narrow_row(t->run, values + row * count, count, after, to, row);
	count_time(t, NARROWING);
	meet(t);
}

static void
deal_norm(struct thread *t, const struct norm *norm, const struct product *after)
{
	const struct network *n = t->run->network;
	float	   *tokens = t->run->batch->tokens;

	EACH_PIECE(row, &t->run->team, t->run->batch->rows)
	{
		chosen.normalize(tokens + row * n->width, norm->weight, norm->bias, n->epsilon, n->width);
		if (after)
			narrow_row(t->run, tokens + row * n->width, n->width, after, &t->run->narrow, row);
	}
	count_time(t, NORMS);
	meet(t);
}

static void
deal_joined(struct thread *t, const struct layer *layer, struct narrowed rows)
{
	long		panels = panels_of(&layer->joined[0]);

	EACH_PIECE(piece, &t->run->team, panels * layer->parts)
	{
		long		part = piece / panels;
		struct finish f = joined_finish(t->run, &layer->joined[part], part * t->run->network->width, rows);

		multiply_all(t, &f, piece % panels, 1);
	}
	count_time(t, JOINED);
	meet(t);
}

static void
by_products(struct thread *t, const struct layer *layer, const struct layer *after)
{
	struct run *run = t->run;
	const struct network *n = run->network;
	float	   *tokens = run->batch->tokens;
	int			floats = run->type == FLOATS;
	struct narrowed plain = {.words = tokens, .stride = n->width};
	struct narrowed seen = {.words = run->seen, .stride = n->width};
	struct narrowed inner = {.words = run->inner, .stride = n->inner};
	struct finish f;

	deal_joined(t, layer, floats ? plain : run->narrow);
	deal_attention(t);
	meet(t);
	if (!floats)
		deal_narrowing(t, run->seen, n->width, &layer->output, &run->narrow);
	f = added_finish(run, &layer->output, floats ? seen : run->narrow, tokens);
	deal_product(t, &f);
	count_time(t, OUTPUT);
	meet(t);
	deal_norm(t, &layer->attention_norm, &layer->up);
	f = inner_finish(run, &layer->up, floats ? plain : run->narrow, run->inner, run->narrow_inner.words);
	deal_product(t, &f);
	count_time(t, UP);
	meet(t);
	if (run->type == BYTES)
		deal_narrowing(t, run->inner, n->inner, &layer->down, &run->narrow_inner);
	f = added_finish(run, &layer->down, floats ? inner : run->narrow_inner, tokens);
	deal_product(t, &f);
	count_time(t, DOWN);
	meet(t);
	deal_norm(t, &layer->norm, after ? &after->joined[0] : NULL);
}

/* --- many rows: stretch by stretch ------------------------------------------------------------------------------- */

struct stretch					/* rows that a thread has for itself */
{
	long		first;
	long		rows;
	struct narrowed narrow;
	struct narrowed narrow_inner;
	float	   *inner;
};

static struct stretch
take_stretch(struct thread *t, long number)
{
	const struct network *n = t->run->network;
	long		size = stretch_of(n);
	struct stretch s;
	char	   *space = t->scratch;

	s.first = number * size;
	s.rows = t->run->batch->rows - s.first < size ? t->run->batch->rows - s.first : size;
	s.narrow = place_rows(&space, n->type, size, n->width);
	s.narrow_inner = place_rows(&space, n->type, size, n->inner);
	if (n->type == HALVES)
		clear_padding(&s.narrow_inner, s.rows, n->inner);
	s.inner = (float *) space;
	return s;
}

static void
narrow_stretch(struct thread *t, const struct stretch *s, float *values, long count, const struct product *after, const struct narrowed *to)
{
	for (long row = 0; row < s->rows; row++)
		narrow_row(t->run, values + row * count, count, after, to, row);
	count_time(t, NARROWING);
}

static void
norm_stretch(struct thread *t, const struct stretch *s, const struct norm *norm)
{
	const struct network *n = t->run->network;
	float	   *tokens = t->run->batch->tokens + s->first * n->width;

	for (long row = 0; row < s->rows; row++)
		chosen.normalize(tokens + row * n->width, norm->weight, norm->bias, n->epsilon, n->width);
	count_time(t, NORMS);
}

static void
multiply_stretch(struct thread *t, const struct stretch *s, const struct finish *f, enum stage stage)
{
	multiply(t, f, t->run->type, 0, s->rows, 0, panels_of(f->product));
	count_time(t, stage);
}

static void
before_attention(struct thread *t, const struct stretch *s, const struct layer *layer)
{
	const struct network *n = t->run->network;
	long		place = s->first * 3 * n->width;
	struct finish f = joined_finish(t->run, &layer->joined[0], place, s->narrow);

	narrow_stretch(t, s, t->run->batch->tokens + s->first * n->width, n->width, &layer->joined[0], &s->narrow);
	multiply_stretch(t, s, &f, JOINED);
}

static void
after_attention(struct thread *t, const struct stretch *s, const struct layer *layer)
{
	const struct run *run = t->run;
	const struct network *n = run->network;
	float	   *tokens = run->batch->tokens + s->first * n->width;
	struct finish f = added_finish(run, &layer->output, s->narrow, tokens);

	/* what the first product is added to: it comes panel by panel, which the processor does not foresee */
	for (long line = 0; line < s->rows * n->width; line += 16)
		__builtin_prefetch(tokens + line, 1, 2);
	narrow_stretch(t, s, run->seen + s->first * n->width, n->width, &layer->output, &s->narrow);
	multiply_stretch(t, s, &f, OUTPUT);
	norm_stretch(t, s, &layer->attention_norm);
	narrow_stretch(t, s, tokens, n->width, &layer->up, &s->narrow);
	f = inner_finish(run, &layer->up, s->narrow, s->inner, s->narrow_inner.words);
	multiply_stretch(t, s, &f, UP);
	if (run->type == BYTES)
		narrow_stretch(t, s, s->inner, n->inner, &layer->down, &s->narrow_inner);
	f = added_finish(run, &layer->down, s->narrow_inner, tokens);
	multiply_stretch(t, s, &f, DOWN);
	norm_stretch(t, s, &layer->norm);
}

static void
by_stretches(struct thread *t, long first, long last)
{
	const struct network *n = t->run->network;
	long		stretches = (t->run->batch->rows + stretch_of(n) - 1) / stretch_of(n);

	for (long layer = first; layer <= last; layer++)
	{
		EACH_PIECE(number, &t->run->team, stretches)
		{
			struct stretch s = take_stretch(t, number);

			if (layer > first)
				after_attention(t, &s, &n->layers[layer - 1]);
			if (layer < last)
				before_attention(t, &s, &n->layers[layer]);
		}
		meet(t);
		if (layer < last)
		{
			deal_attention(t);
			meet(t);
		}
	}
}

/* --- all together ------------------------------------------------------------------------------------------------ */

static void
run_thread(struct run *run, long first, long last)
{
	struct thread t = {.run = run};
	const struct network *n = run->network;

	t.scratch = run->scratch + omp_get_thread_num() * run->piece;
	t.sums = (int32_t *) (t.scratch + run->piece - MOST_TILE_ROWS * PANEL * 4);
	if (run->batch->seconds && omp_get_thread_num() == 0)
	{
		t.seconds = run->batch->seconds;
		t.since = clock_now();
	}
	shape_tiles();
	if (first == 0)
		deal_embeddings(&t);
	if (run->type == FLOATS || run->batch->rows <= FEW_ROWS)
	{
		if (run->type != FLOATS)
			deal_narrowing(&t, run->batch->tokens, n->width, &n->layers[first].joined[0], &run->narrow);
		for (long layer = first; layer < last; layer++)
			by_products(&t, &n->layers[layer], layer + 1 < last ? &n->layers[layer + 1] : NULL);
	}
	else
		by_stretches(&t, first, last);
	release_tiles();
}

/* The layers from `first` to before `last`; before the first one, the embeddings. -1 where there is no such token. */
int
autoembed_layers(const struct network *n, const struct batch *b, long first, long last, int threads)
{
	struct run	run = {.network = n, .batch = b, .type = n->type, .attention = attention_type(n)};

	place_all(&run, b->space, b->rows, b->longest, threads);
	if (n->type == HALVES && b->rows <= FEW_ROWS)
		clear_padding(&run.narrow_inner, b->rows, n->inner);
	if (first == 0 && number_tokens(&n->embeddings, b, run.positions) < 0)
		return -1;
#pragma omp parallel num_threads(threads)
	{
#pragma omp single
		run.team.threads = omp_get_num_threads();
		run_thread(&run, first, last);
	}
	return 0;
}

/* --- a product alone, for tests and measurements ----------------------------------------------------------------- */

static long
product_piece(long type, const struct product *p)
{
	return rounded((type == FLOATS ? p->inputs * PANEL * 4 : 0) + MOST_TILE_ROWS * PANEL * 4, 64);
}

long
autoembed_product_space(long type, const struct product *p, long rows, int threads)
{
	char	   *space = NULL;

	if (type != FLOATS)
		place_rows(&space, type, rows, p->inputs);
	return space - (char *) NULL + product_piece(type, p) * threads + 64;
}

/* rows x outputs of rows x inputs; where x is null, of those that the last call has left in `space` */
void
autoembed_product(long type, const struct product *p, float *x, long rows, long activation, const float *residual, float *out, char *space, int threads)
{
	struct batch b = {.rows = rows};
	struct run	run = {.batch = &b, .type = type};
	struct finish f = {.product = p, .activation = activation, .residual = residual, .residual_stride = p->outputs, .floats = out, .stride = p->outputs};

	space = (char *) rounded((long) space, 64);
	f.rows = (struct narrowed) {.words = x, .stride = p->inputs};
	if (type != FLOATS)
		f.rows = place_rows(&space, type, rows, p->inputs);
	for (long row = 0; x && type != FLOATS && row < rows; row++)
		narrow_row(&run, x + row * p->inputs, p->inputs, p, &f.rows, row);
#pragma omp parallel num_threads(threads)
	{
		struct thread t = {.run = &run};

#pragma omp single
		run.team.threads = omp_get_num_threads();
		t.scratch = space + omp_get_thread_num() * product_piece(type, p);
		t.sums = (int32_t *) (t.scratch + product_piece(type, p) - MOST_TILE_ROWS * PANEL * 4);
		shape_tiles();
		if (type == FLOATS || rows <= FEW_ROWS)
			deal_product(&t, &f);
		else
		{
			EACH_PIECE(number, &run.team, (rows + STRETCH - 1) / STRETCH)
				multiply(&t, &f, type, number * STRETCH, rows - number * STRETCH < STRETCH ? rows - number * STRETCH : STRETCH, 0, panels_of(p));
		}
		release_tiles();
	}
}
