/*
 * What the layers of an encoder need of one kind of processor: included once for each, between two of lanes.h.
 */
#define exponential NAMED(exponential, SUFFIX)
#define sigmoid NAMED(sigmoid, SUFFIX)
#define normal NAMED(normal, SUFFIX)
#define nearly_normal NAMED(nearly_normal, SUFFIX)
#define activated NAMED(activated, SUFFIX)
#define finish_columns NAMED(finish_columns, SUFFIX)
#define finish_sums NAMED(finish_sums, SUFFIX)
#define embed NAMED(embed, SUFFIX)
#define normalize NAMED(normalize, SUFFIX)
#define narrow NAMED(narrow, SUFFIX)
#define quantize NAMED(quantize, SUFFIX)
#define softmax NAMED(softmax, SUFFIX)
#define weigh NAMED(weigh, SUFFIX)
#define transpose NAMED(transpose, SUFFIX)
#define pair NAMED(pair, SUFFIX)
#define dots NAMED(dots, SUFFIX)
#define dot_tile NAMED(dot_tile, SUFFIX)

/* --- small products, in any number type ------------------------------------------------------------------------- */

#define TILE NAMED(tile_floats, SUFFIX)
#define TILE_ROWS MOST_ROWS
#define VECTOR lanes
#define FACTOR lanes
#define ZERO splat(0.0f)
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
#define SPREAD(word) splat(*(const float *) (word))
#define FETCH(from) load((const float *) (from))
#define KEEP(to, values) store((float *) (to), values)
#include "tile.h"

/* bfloat16 as floats: for processors that do not multiply it */
#define upper NAMED(upper, SUFFIX)
#define lower NAMED(lower, SUFFIX)

TARGET INLINE lanes
lower(words pairs)
{
#if WIDTH == 512
	return as_lanes(_mm512_slli_epi32(pairs, 16));
#elif WIDTH == 256
	return as_lanes(_mm256_slli_epi32(pairs, 16));
#else
	return as_lanes(pairs << 16);
#endif
}

TARGET INLINE lanes
upper(words pairs)
{
#if WIDTH == 512
	return as_lanes(_mm512_and_si512(pairs, _mm512_set1_epi32((int) 0xffff0000)));
#elif WIDTH == 256
	return as_lanes(_mm256_and_si256(pairs, _mm256_set1_epi32((int) 0xffff0000)));
#else
	return as_lanes(pairs & (int32_t) 0xffff0000);
#endif
}

#define TILE NAMED(tile_halves, SUFFIX)
#define TILE_ROWS (MOST_ROWS > 6 ? 6 : 3)
#define VECTOR lanes
#define FACTOR words
#define ZERO splat(0.0f)
#define MULTIPLY_ADD(sum, a, b) ((sum) + lower(a) * lower(b) + upper(a) * upper(b))
#define SPREAD(word) spread_word(word)
#define FETCH(from) fetch_words(from)
#define KEEP(to, values) store((float *) (to), values)
#include "tile.h"

/* Sums along floats as they are published, an output after another: nothing needs to be packed for a few rows. */
#define DOT_ROWS (MOST_ROWS / 2)
#define DOT_OUTPUTS (LANES == 16 ? 4 : 2)

TARGET INLINE void
dots(const float *const *x, const float *const *weights, long depth, float *sums, const int rows, const int outputs)
{
	lanes		each[DOT_ROWS][DOT_OUTPUTS];
	long		k;

#pragma GCC unroll 8
	for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
		for (int o = 0; o < outputs; o++)
			each[r][o] = splat(0.0f);
	for (k = 0; k + LANES <= depth; k += LANES)
	{
		lanes		columns[DOT_OUTPUTS];

#pragma GCC unroll 8
		for (int o = 0; o < outputs; o++)
			columns[o] = load(weights[o] + k);
#pragma GCC unroll 8
		for (int r = 0; r < rows; r++)
		{
			lanes		row = load(x[r] + k);

#pragma GCC unroll 8
			for (int o = 0; o < outputs; o++)
				each[r][o] += row * columns[o];
		}
	}
#pragma GCC unroll 8
	for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
		for (int o = 0; o < outputs; o++)
		{
			float		sum = total(each[r][o]);

			for (long rest = k; rest < depth; rest++)
				sum += x[r][rest] * weights[o][rest];
			sums[r * PANEL + o] = sum;
		}
}

/* `outputs` of the panel are there; the sums of the others are anything */
TARGET static void
dot_tile(const float *x, long stride, const float *weights, long depth, int rows, long outputs, float *sums)
{
	for (long o = 0; o < outputs && o < PANEL; o += DOT_OUTPUTS)
	{
		const float *columns[DOT_OUTPUTS];

		for (int i = 0; i < DOT_OUTPUTS; i++)
			columns[i] = weights + (o + i < outputs ? o + i : outputs - 1) * depth;
		for (int from = 0; from < rows; from += DOT_ROWS)
		{
			const float *these[DOT_ROWS];
			float	   *place = sums + from * PANEL + o;

			for (int r = 0; r < DOT_ROWS; r++)
				these[r] = x + (from + r < rows ? from + r : rows - 1) * stride;
			switch (rows - from)
			{
				case 1:
					dots(these, columns, depth, place, 1, DOT_OUTPUTS);
					break;
				case 2:
					dots(these, columns, depth, place, 2, DOT_OUTPUTS);
					break;
#if MOST_ROWS > 4
				case 3:
					dots(these, columns, depth, place, 3, DOT_OUTPUTS);
					break;
#endif
#if MOST_ROWS > 6
				case 4:
					dots(these, columns, depth, place, 4, DOT_OUTPUTS);
					break;
				case 5:
					dots(these, columns, depth, place, 5, DOT_OUTPUTS);
					break;
#endif
				default:
					dots(these, columns, depth, place, DOT_ROWS, DOT_OUTPUTS);
			}
		}
	}
}

/* --- what lies between products --------------------------------------------------------------------------------- */

/* e^x for x <= 0, to 2e-7: 2^n by the exponent's bits, the rest by a polynomial (Cephes). NaN stays NaN. */
TARGET INLINE lanes
exponential(lanes x)
{
	lanes		scaled = larger(x, splat(-87.0f)) * 1.44269504f;
	words		whole = nearest(scaled);
	lanes		r = (scaled - from_words(whole)) * 0.693147181f;
	lanes		power;

#if WIDTH == 512
	power = as_lanes(_mm512_slli_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(127)), 23));
#elif WIDTH == 256
	power = as_lanes(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23));
#else
	power = as_lanes((whole + 127) << 23);
#endif
	/* a NaN compares with nothing, and would be gone by now */
	return x * 0.0f + power * (1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f))))));
}

/* 1 / (1 + e^-x) */
TARGET INLINE lanes
sigmoid(lanes x)
{
	lanes		tail = exponential(-magnitude(x));
	lanes		small = tail / (1.0f + tail);	/* of -|x| */

	/* x > 0 ? 1 - small : small, without a comparison: sign is 1, 0 or -1 */
	lanes		sign = larger(smaller(x * 1e30f, splat(1.0f)), splat(-1.0f));

	return 0.5f + sign * (0.5f - small);
}

/* x * P(X <= x), X normal; the error function by Abramowitz and Stegun 7.1.26, to 1.5e-7 */
TARGET INLINE lanes
normal(lanes x)
{
	lanes		z = magnitude(x) * 0.707106781f;
	lanes		t = 1.0f / (1.0f + 0.3275911f * z);
	lanes		tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) * exponential(-z * z);

	/* half of x + |x| (1 - tail), which for x < 0 is x tail / 2 */
	return 0.5f * (x + magnitude(x) * (1.0f - tail));
}

/* the same to 4e-5, where what comes after is less exact than that */
TARGET INLINE lanes
nearly_normal(lanes x)
{
	lanes		near = smaller(larger(x, splat(-4.5f)), splat(4.5f));
	lanes		u = near * near * (2.0f / 20.25f) - 1.0f;
	lanes		odd = 0.0122084785f + u * (-0.00932854823f + u * 0.00335371823f);

	odd = 0.156902113f + u * (-0.0771719596f + u * (0.0548185647f + u * (-0.0405557726f + u * (0.027629425f + u * (-0.0167440307f + u * odd)))));
	return x * (0.5f + near * odd);
}

TARGET INLINE lanes
activated(lanes x, long activation)
{
	switch (activation)
	{
		case GELU:
			return normal(x);
		case GELU_NEARLY:
			return nearly_normal(x);
		case GELU_TANH:
			return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
		case RELU:
			return larger(x, splat(0.0f)) + x * 0.0f;
		default:
			return x;
	}
}

/* From a tile's sums to the product's outputs: scale, bias, activation, and what they are added to. */
TARGET INLINE void
finish_columns(const struct finish *f, const void *sums, long row, int rows, long output, const int bytes, const long activation)
{
	const struct product *p = f->product;
	const float *residual = f->residual;
	const float *row_scales = f->rows.scales;
	const float *row_least = f->rows.least;
	float	   *floats = f->floats;
	uint16_t   *halves = f->halves;
	long		residual_stride = f->residual_stride;
	long		stride = f->stride;

	for (long c = 0; c < PANEL && output + c < p->outputs; c += LANES)
	{
		long		o = output + c;
		long		some = p->outputs - o;
		lanes		bias = load_some(p->bias + o, some);
		lanes		scales = bias;
		lanes		column_sums = bias;
		lanes		weights[OUTLIERS];

		if (bytes)
		{
			scales = load_some(p->scales + o, some);
			column_sums = load_some(p->sums + o, some);
#pragma GCC unroll 8
			for (int i = 0; i < OUTLIERS; i++)
				weights[i] = load_some(p->outlier_weights + i * p->outputs + o, some);
		}
		for (int r = 0; r < rows; r++)
		{
			lanes		value;

			if (bytes)
			{
				const float *outliers = f->rows.outliers + (row + r) * OUTLIERS;

				value = from_words(fetch_words((const int32_t *) sums + r * PANEL + c)) * (scales * row_scales[row + r]);
				value += bias + column_sums * row_least[row + r];
#pragma GCC unroll 8
				for (int i = 0; i < OUTLIERS; i++)
					value += weights[i] * outliers[i];
			}
			else
				value = load((const float *) sums + r * PANEL + c) + bias;
			value = activated(value, activation);
			if (residual)
				value += load_some(residual + (row + r) * residual_stride + o, some);
			if (floats)
				store_some(floats + (row + r) * stride + o, value, some);
			else
				store_some_halves(halves + (row + r) * stride + o, value, some);
		}
	}
}

TARGET static void
finish_sums(const struct finish *f, const void *sums, long row, int rows, long output)
{
	if (f->rows.scales && f->activation == NONE)
		finish_columns(f, sums, row, rows, output, 1, NONE);
	else if (f->rows.scales && f->activation == GELU_NEARLY)
		finish_columns(f, sums, row, rows, output, 1, GELU_NEARLY);
	else if (f->rows.scales)
		finish_columns(f, sums, row, rows, output, 1, f->activation);
	else if (f->activation == NONE)
		finish_columns(f, sums, row, rows, output, 0, NONE);
	else if (f->activation == GELU_NEARLY)
		finish_columns(f, sums, row, rows, output, 0, GELU_NEARLY);
	else
		finish_columns(f, sums, row, rows, output, 0, f->activation);
}

/* a word, what is added to all, and a position */
TARGET static void
embed(const void *word, const void *position, long halves, const float *kind, float *to, long count)
{
	const uint16_t *word_halves = word;
	const uint16_t *position_halves = position;

	for (long c = 0; c < count; c += LANES)
	{
		long		some = count - c;
		lanes		value = halves ? load_some_halves(word_halves + c, some) : load_some((const float *) word + c, some);

		if (kind)
			value += load_some(kind + c, some);
		value += halves ? load_some_halves(position_halves + c, some) : load_some((const float *) position + c, some);
		store_some(to + c, value, some);
	}
}

/* layer normalization in place */
TARGET static void
normalize(float *values, const float *weight, const float *bias, float epsilon, long count)
{
	lanes		sums = splat(0.0f);
	lanes		squares = splat(0.0f);
	float		mean;
	float		inverse;
	long		c;

	for (c = 0; c + LANES <= count; c += LANES)
		sums += load(values + c);
	mean = total(sums + load_some(values + c, count - c)) / count;
	for (c = 0; c + LANES <= count; c += LANES)
	{
		lanes		off = load(values + c) - mean;

		squares += off * off;
	}
	inverse = total(squares);
	for (; c < count; c++)
		inverse += (values[c] - mean) * (values[c] - mean);
	inverse = 1.0f / sqrtf(inverse / count + epsilon);
	for (c = 0; c < count; c += LANES)
	{
		lanes		normed = (load_some(values + c, count - c) - mean) * inverse;

		store_some(values + c, normed * load_some(weight + c, count - c) + load_some(bias + c, count - c), count - c);
	}
}

/* to bfloat16, and zeros up to `room` */
TARGET static void
narrow(const float *values, long count, uint16_t *to, long room)
{
	long		c;

	for (c = 0; c + LANES <= count; c += LANES)
		store_halves(to + c, load(values + c));
	if (c < count)
		store_some_halves(to + c, load_some(values + c, count - c), count - c);
	memset(to + count, 0, (room - count) * sizeof(uint16_t));
}

/*
 * To bytes and zeros up to `room`: values = bytes * scale + least, but for the outliers, which are kept as they are.
 * What is not finite has no byte: it makes the scale NaN, and so all that comes of this row.
 */
TARGET static void
quantize(float *values, long count, const int64_t *places, uint8_t *to, long room, float *scale, float *least, float *outliers)
{
	lanes		low = splat(0.0f);
	lanes		high = splat(0.0f);
	lanes		poison = splat(0.0f);
	float		range;
	float		from;
	float		inverse;
	long		c;

	for (int i = 0; i < OUTLIERS; i++)
		outliers[i] = values[places[i]];
	for (int i = 0; i < OUTLIERS; i++)
		values[places[i]] = 0;
	for (c = 0; c < count; c += LANES)
	{
		lanes		these = load_some(values + c, count - c);

		poison += these * 0.0f;
		low = smaller(these, low);
		high = larger(these, high);
	}
	from = -highest(-low);
	range = highest(high) - from;
	*least = from;
	*scale = range / 255.0f + total(poison);
	inverse = range > 0 ? 255.0f / range : 0;
	for (c = 0; c + LANES <= count; c += LANES)
		store_bytes(to + c, nearest((load(values + c) - from) * inverse));
	for (; c < count; c++)
	{
		uint8_t		all[LANES];

		store_bytes(all, nearest((splat(values[c]) - from) * inverse));
		to[c] = all[0];
	}
	memset(to + count, 0, room - count);
	for (int i = 0; i < OUTLIERS; i++)
		values[places[i]] = outliers[i];
}

/* --- attention -------------------------------------------------------------------------------------------------- */

/*
 * One row of scores, a stretch of PANEL for each panel of keys, each `apart`: e^(scores * scale + biases - the largest)
 * as floats or bfloat16, side by side, zero for keys that there are not. Returns one over their sum.
 */
TARGET static float
softmax(float *scores, long apart, const float *biases, float scale, long keys, float *floats, uint16_t *halves)
{
	lanes		most = splat(-INFINITY);
	lanes		sum = splat(0.0f);
	float		largest;

	for (long k = keys; k < (keys + PANEL - 1) / PANEL * PANEL; k++)
		scores[k / PANEL * apart + k % PANEL] = NO_KEY;
	for (long k = 0; k < keys; k += LANES)
	{
		float	   *place = scores + k / PANEL * apart + k % PANEL;
		lanes		score = load(place) * scale;

		if (biases)
			score += load(biases + k);
		store(place, score);
		most = larger(score, most);
	}
	largest = highest(most);
	for (long k = 0; k < (keys + PANEL - 1) / PANEL * PANEL; k += LANES)
	{
		lanes		value = exponential(load(scores + k / PANEL * apart + k % PANEL) - largest);

		sum += value;
		if (halves)
			store_halves(halves + k, value);
		else
			store(floats + k, value);
	}
	return 1.0f / total(sum);
}

TARGET static void
weigh(const float *sums, float weight, float *to, long count)
{
	for (long c = 0; c < count; c += LANES)
		store_some(to + c, load(sums + c) * weight, count - c);
}

/* rows of words to a panel's columns, zeros where there are no more rows: [depth][PANEL] */
TARGET static void
transpose(const int32_t *from, long apart, long rows, long depth, int32_t *to)
{
	for (long row = 0; row < PANEL; row += 4)
	{
		long		d = 0;

		if (row + 4 <= rows)
			for (; d + 4 <= depth; d += 4)
			{
				four		in[4];
				four		pairs[4];
				four		out[4];

				for (int r = 0; r < 4; r++)
					memcpy(&in[r], from + (row + r) * apart + d, sizeof(four));
				for (int r = 0; r < 4; r += 2)
				{
					pairs[r] = SHUFFLE(in[r], in[r + 1], 0, 4, 1, 5);
					pairs[r + 1] = SHUFFLE(in[r], in[r + 1], 2, 6, 3, 7);
				}
				for (int r = 0; r < 2; r++)
				{
					out[2 * r] = SHUFFLE(pairs[r], pairs[r + 2], 0, 1, 4, 5);
					out[2 * r + 1] = SHUFFLE(pairs[r], pairs[r + 2], 2, 3, 6, 7);
				}
				for (int r = 0; r < 4; r++)
					memcpy(to + (d + r) * PANEL + row, &out[r], sizeof(four));
			}
		for (; d < depth; d++)
			for (long r = row; r < row + 4; r++)
				to[d * PANEL + r] = r < rows ? from[r * apart + d] : 0;
	}
}

/* rows of bfloat16 two by two, and `count` of them (up to PANEL) to words of the pairs: [rows / 2][PANEL] */
TARGET static void
pair(const uint16_t *from, long apart, long rows, long count, int32_t *to)
{
	for (long row = 0; row < rows; row += 2)
	{
		const uint16_t *first = from + row * apart;
		const uint16_t *second = row + 1 < rows ? first + apart : 0;

		for (long c = 0; c < count; c++)
			to[row / 2 * PANEL + c] = (int32_t) (first[c] | (uint32_t) (second ? second[c] : 0) << 16);
		for (long c = count; c < PANEL; c++)
			to[row / 2 * PANEL + c] = 0;
	}
}

#undef exponential
#undef sigmoid
#undef normal
#undef nearly_normal
#undef activated
#undef upper
#undef lower
#undef finish_columns
#undef finish_sums
#undef embed
#undef normalize
#undef narrow
#undef quantize
#undef softmax
#undef weigh
#undef transpose
#undef pair
#undef dots
#undef dot_tile
