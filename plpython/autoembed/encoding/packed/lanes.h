/*
 * A processor's vectors: as many floats, or 32-bit words, as it computes at once. Included once for each kind of
 * processor, with SUFFIX; TARGET; WIDTH: its vectors' bits, 512, 256 or 128. Included again, it takes its names back.
 */
#ifndef LANES
#define lanes NAMED(lanes, SUFFIX)
#define words NAMED(words, SUFFIX)
#define load NAMED(load, SUFFIX)
#define store NAMED(store, SUFFIX)
#define load_some NAMED(load_some, SUFFIX)
#define store_some NAMED(store_some, SUFFIX)
#define splat NAMED(splat, SUFFIX)
#define larger NAMED(larger, SUFFIX)
#define smaller NAMED(smaller, SUFFIX)
#define magnitude NAMED(magnitude, SUFFIX)
#define nearest NAMED(nearest, SUFFIX)
#define from_words NAMED(from_words, SUFFIX)
#define as_lanes NAMED(as_lanes, SUFFIX)
#define total NAMED(total, SUFFIX)
#define highest NAMED(highest, SUFFIX)
#define fetch_words NAMED(fetch_words, SUFFIX)
#define spread_word NAMED(spread_word, SUFFIX)
#define store_bytes NAMED(store_bytes, SUFFIX)
#define store_halves NAMED(store_halves, SUFFIX)
#define store_some_halves NAMED(store_some_halves, SUFFIX)
#define load_halves NAMED(load_halves, SUFFIX)
#define load_some_halves NAMED(load_some_halves, SUFFIX)

#if WIDTH == 512
#define LANES 16
#define MOST_ROWS 12
typedef __m512 lanes;
typedef __m512i words;
#elif WIDTH == 256
#define LANES 8
#define MOST_ROWS 6
typedef __m256 lanes;
typedef __m256i words;
#else
#define LANES 4
#define MOST_ROWS 4
typedef float lanes __attribute__((vector_size(16)));
typedef int32_t words __attribute__((vector_size(16)));
#endif

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

/* Fewer than LANES; what is loaded of the rest is zero. No calls: all vectors would have to be saved around them. */
TARGET INLINE lanes
load_some(const float *from, long count)
{
	if (count >= LANES)
		return load(from);
	else
	{
#if WIDTH == 512
		return _mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
		float		all[LANES] = {0};

		for (long i = 0; i < count; i++)
		{
			all[i] = from[i];
			__asm__ volatile("");
		}
		return load(all);
#endif
	}
}

TARGET INLINE void
store_some(float *to, lanes values, long count)
{
	if (count >= LANES)
		store(to, values);
	else
	{
#if WIDTH == 512
		_mm512_mask_storeu_ps(to, (1u << count) - 1, values);
#else
		float		all[LANES];

		store(all, values);
		for (long i = 0; i < count; i++)
		{
			to[i] = all[i];
			__asm__ volatile("");
		}
#endif
	}
}

TARGET INLINE lanes
splat(float value)
{
#if WIDTH == 512
	return _mm512_set1_ps(value);
#elif WIDTH == 256
	return _mm256_set1_ps(value);
#else
	return (lanes) {value, value, value, value};
#endif
}

TARGET INLINE lanes
larger(lanes a, lanes b)
{
#if WIDTH == 512
	return _mm512_max_ps(a, b);
#elif WIDTH == 256
	return _mm256_max_ps(a, b);
#else
	for (int i = 0; i < LANES; i++)
		a[i] = a[i] > b[i] ? a[i] : b[i];
	return a;
#endif
}

TARGET INLINE lanes
smaller(lanes a, lanes b)
{
#if WIDTH == 512
	return _mm512_min_ps(a, b);
#elif WIDTH == 256
	return _mm256_min_ps(a, b);
#else
	for (int i = 0; i < LANES; i++)
		a[i] = a[i] < b[i] ? a[i] : b[i];
	return a;
#endif
}

TARGET INLINE lanes
as_lanes(words bits)
{
	lanes		values;

	memcpy(&values, &bits, sizeof(values));
	return values;
}

TARGET INLINE lanes
magnitude(lanes values)
{
	words		bits;

	memcpy(&bits, &values, sizeof(bits));
#if WIDTH == 512
	return as_lanes(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
#elif WIDTH == 256
	return as_lanes(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
#else
	return as_lanes(bits & 0x7fffffff);
#endif
}

/* whole numbers of what is not too large for them; anything of what is */
TARGET INLINE words
nearest(lanes values)
{
#if WIDTH == 512
	return _mm512_cvtps_epi32(values);
#elif WIDTH == 256
	return _mm256_cvtps_epi32(values);
#else
	words		whole;

	for (int i = 0; i < LANES; i++)
	{
		float		bounded = values[i] < 2147483520.0f ? values[i] : 2147483520.0f;

		whole[i] = (int32_t) rintf(bounded > -2147483520.0f ? bounded : -2147483520.0f);
	}
	return whole;
#endif
}

TARGET INLINE lanes
from_words(words whole)
{
#if WIDTH == 512
	return _mm512_cvtepi32_ps(whole);
#elif WIDTH == 256
	return _mm256_cvtepi32_ps(whole);
#else
	return __builtin_convertvector(whole, lanes);
#endif
}

TARGET INLINE float
total(lanes values)
{
	float		each[LANES];

	store(each, values);
	for (int half = LANES / 2; half > 0; half /= 2)
		for (int i = 0; i < half; i++)
			each[i] += each[i + half];
	return each[0];
}

TARGET INLINE float
highest(lanes values)
{
	float		each[LANES];
	float		most;

	store(each, values);
	most = each[0];
	for (int i = 1; i < LANES; i++)
		most = each[i] > most ? each[i] : most;
	return most;
}

TARGET INLINE words
fetch_words(const int32_t *from)
{
	words		values;

	memcpy(&values, from, sizeof(values));
	return values;
}

TARGET INLINE words
spread_word(const int32_t *from)
{
#if WIDTH == 512
	return _mm512_set1_epi32(*from);
#elif WIDTH == 256
	return _mm256_set1_epi32(*from);
#else
	return (words) {*from, *from, *from, *from};
#endif
}

/* whole numbers from 0 to 255 */
TARGET INLINE void
store_bytes(uint8_t *to, words whole)
{
#if WIDTH == 512
	_mm_storeu_si128((__m128i *) to, _mm512_cvtepi32_epi8(whole));
#elif WIDTH == 256
	__m128i		halves = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));

	_mm_storel_epi64((__m128i *) to, _mm_packus_epi16(halves, halves));
#else
	for (int i = 0; i < LANES; i++)
		to[i] = (uint8_t) whole[i];
#endif
}

/* the upper halves of floats, rounded to even: bfloat16; NaN stays NaN */
TARGET INLINE void
store_halves(uint16_t *to, lanes values)
{
#if WIDTH == 512
	__m512i		bits = _mm512_castps_si512(values);
	__m512i		even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
	__m512i		rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));

	rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
	_mm256_storeu_si256((__m256i *) to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
	uint32_t	bits[LANES];

	memcpy(bits, &values, sizeof(bits));
	for (int i = 0; i < LANES; i++)
		to[i] = (bits[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
#endif
}

TARGET INLINE void
store_some_halves(uint16_t *to, lanes values, long count)
{
	if (count >= LANES)
		store_halves(to, values);
	else
	{
		uint16_t	all[LANES];

		store_halves(all, values);
		for (long i = 0; i < count; i++)
		{
			to[i] = all[i];
			__asm__ volatile("");
		}
	}
}

TARGET INLINE lanes
load_halves(const uint16_t *from)
{
#if WIDTH == 512
	return as_lanes(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) from)), 16));
#elif WIDTH == 256
	return as_lanes(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) from)), 16));
#else
	words		bits;

	for (int i = 0; i < LANES; i++)
		bits[i] = (int32_t) ((uint32_t) from[i] << 16);
	return as_lanes(bits);
#endif
}

TARGET INLINE lanes
load_some_halves(const uint16_t *from, long count)
{
	if (count >= LANES)
		return load_halves(from);
	else
	{
		uint16_t	all[LANES] = {0};

		for (long i = 0; i < count; i++)
		{
			all[i] = from[i];
			__asm__ volatile("");
		}
		return load_halves(all);
	}
}

#else
#undef lanes
#undef words
#undef load
#undef store
#undef load_some
#undef store_some
#undef splat
#undef larger
#undef smaller
#undef magnitude
#undef nearest
#undef from_words
#undef as_lanes
#undef total
#undef highest
#undef fetch_words
#undef spread_word
#undef store_bytes
#undef store_halves
#undef store_some_halves
#undef load_halves
#undef load_some_halves
#undef LANES
#undef MOST_ROWS
#undef SUFFIX
#undef TARGET
#undef WIDTH
#endif
