/*
 * One head of one text. Included once for each kind of processor, with
 * LANES: floats that it computes at once; QUERIES and WIDE: as many sums as stay in its registers.
 */
#define lanes NAMED(lanes, SUFFIX)
#define load NAMED(load, SUFFIX)
#define store NAMED(store, SUFFIX)
#define tile NAMED(tile, SUFFIX)
#define product NAMED(product, SUFFIX)
#define softmax NAMED(softmax, SUFFIX)
#define look NAMED(look, SUFFIX)

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

TARGET INLINE lanes
load(const float *from)
{
	lanes		values;

	memcpy(&values, from, sizeof(values));
	return values;
}

TARGET INLINE void
store(float *to, lanes values)
{
	memcpy(to, &values, sizeof(values));
}

/* QUERIES rows of `left` (a row each, `depth` long) times wide * LANES columns of `right`, each row times its weight */
TARGET INLINE void
tile(const float *const *left, const float *right, long stride, long depth, float *const *out, const float *weights, const int wide)
{
	lanes		sums[QUERIES][WIDE] = {0};

	for (long i = 0; i < depth; i++)
	{
		lanes		row[WIDE];

#pragma GCC unroll 8
		for (int w = 0; w < wide; w++)
			row[w] = load(right + i * stride + w * LANES);
#pragma GCC unroll 8
		for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
			for (int w = 0; w < wide; w++)
				sums[q][w] += left[q][i] * row[w];
	}
#pragma GCC unroll 8
	for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
		for (int w = 0; w < wide; w++)
			store(out[q] + w * LANES, sums[q][w] * weights[q]);
}

/* the same of all columns, a multiple of LANES */
TARGET INLINE void
product(const float *const *left, const float *right, long stride, long depth, float *const *out, const float *weights, long columns)
{
	float	   *places[QUERIES];
	long		c = 0;

	memcpy(places, out, sizeof(places));
	while (c < columns)
	{
		long		wide = columns - c >= WIDE * LANES ? WIDE : columns - c >= 2 * LANES ? 2 : 1;

		if (wide == WIDE)
			tile(left, right + c, stride, depth, places, weights, WIDE);
		else if (wide == 2)
			tile(left, right + c, stride, depth, places, weights, 2);
		else
			tile(left, right + c, stride, depth, places, weights, 1);
		for (int q = 0; q < QUERIES; q++)
			places[q] += wide * LANES;
		c += wide * LANES;
	}
}

/* e^(scores + biases - their largest); returns one over their sum */
TARGET static float
softmax(float *restrict scores, const float *restrict biases, long length)
{
	float		most = -INFINITY;
	float		sum = 0;

	if (biases)
	{
#pragma omp simd
		for (long k = 0; k < length; k++)
			scores[k] += biases[k];
	}
#pragma omp simd reduction(max:most)
	for (long k = 0; k < length; k++)
		most = scores[k] > most ? scores[k] : most;
#pragma omp simd reduction(+:sum)
	for (long k = 0; k < length; k++)
	{
		scores[k] = exp_negative(scores[k] - most);
		sum += scores[k];
	}
	return 1.0f / sum;
}

TARGET static void
look(const struct attention *a, long text, long longest, long head, long heads, long size, float scale, float *scratch)
{
	long		width = heads * size;
	long		start = a->starts[text];
	long		length = a->starts[text + 1] - start;
	long		stride = padded(length);
	const float *joined = a->joined + start * 3 * width + head * size;
	float	   *keys = scratch;
	float	   *values = keys + stride * size;
	float	   *scores = values + length * size;

	transpose(joined + width, 3 * width, length, size, keys, stride);
	for (long k = 0; k < length; k++)
		memcpy(values + k * size, joined + (3 * k + 2) * width, size * sizeof(float));
	for (long from = 0; from < length; from += QUERIES)
	{
		const float *queries[QUERIES];
		const float *looks[QUERIES];
		float	   *rows[QUERIES];
		float	   *seen[QUERIES];
		float		scales[QUERIES];
		float		weights[QUERIES];

		for (int q = 0; q < QUERIES; q++)
		{
			long		row = from + q < length ? from + q : length - 1;	/* the last one again */

			queries[q] = joined + row * 3 * width;
			seen[q] = a->seen + (start + row) * width + head * size;
			looks[q] = rows[q] = scores + q * stride;
			scales[q] = scale;
		}
		product(queries, keys, stride, size, rows, scales, stride);
		for (int q = 0; q < QUERIES; q++)
		{
			long		row = from + q < length ? from + q : length - 1;

			for (long k = length; k < stride; k++)
				rows[q][k] = PADDING;
			weights[q] = softmax(rows[q], a->biases ? a->biases + head * distances(longest) + longest - 1 - row : 0, stride);
		}
		product(looks, values, size, length, seen, weights, size);
	}
}

#undef lanes
#undef load
#undef store
#undef tile
#undef product
#undef softmax
#undef look
#undef SUFFIX
#undef TARGET
#undef LANES
#undef QUERIES
#undef WIDE
