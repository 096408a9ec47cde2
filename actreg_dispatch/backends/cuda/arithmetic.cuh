// Arithmetic that rounds after every operation, on three types of number: float, double, extended.
//
// A norm's formulas are written as calls of the functions here: add, subtract, multiply, divide,
// negative, root, signed and greater.
//
// CuPy compiles with -ftz=true, which would flush subnormal float32 numbers to zero and which no
// option undoes. So whatever touches float32 is stated in PTX. The other option that matters,
// --fmad=false, keeps multiplications and additions apart.

using integer = unsigned long long;

// The type in which T is computed.
template <typename T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };

// float and double.

__device__ inline double widen(bool x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline double widen(float x) {
    double y;
    asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x));
    return y;
}
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(double x, float& y) {
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x));
}

__device__ inline double add(double x, double y) { return x + y; }
__device__ inline double subtract(double x, double y) { return x - y; }
__device__ inline double multiply(double x, double y) { return x * y; }
__device__ inline double divide(double x, double y) { return x / y; }
__device__ inline double negative(double x) { return -x; }
__device__ inline double root(double x) { return sqrt(x); }

#define FLOAT_OPERATION(name, instruction)                                  \
    __device__ inline float name(float x, float y) {                        \
        float z;                                                            \
        asm(instruction " %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));         \
        return z;                                                           \
    }
FLOAT_OPERATION(add, "add.rn.f32")
FLOAT_OPERATION(subtract, "sub.rn.f32")
FLOAT_OPERATION(multiply, "mul.rn.f32")
FLOAT_OPERATION(divide, "div.rn.f32")
__device__ inline float negative(float x) {
    float y;
    asm("neg.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float absolute(float x) {
    float y;
    asm("abs.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float multiply_add(float x, float y, float z) {  // rounded once
    float result;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(x), "f"(y), "f"(z));
    return result;
}
__device__ inline float root(float x) {
    float y;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Whether two numbers are equal, signs of zeros included; NaN is equal to nothing.
__device__ inline bool same(double a, double b) { return a == b && signbit(a) == signbit(b); }
template <typename C> __device__ inline bool greater(C a, C b) { return widen(a) > widen(b); }
__device__ inline bool is_zero(double x) { return x == 0.0; }
__device__ inline bool is_zero(float x) { return __float_as_uint(x) << 1 == 0; }

// a with the sign of x, 0 where x is 0 or NaN. In formulas it is called signed, a keyword of C++.
// lop3 with 0x6a is (x & sign) ^ a.
__device__ inline float with_sign_of(float a, float x) {
    float y;
    asm("{\n"
        ".reg .pred has_sign;\n"
        ".reg .b32 result;\n"
        "lop3.b32 result, %2, 0x80000000, %1, 0x6a;\n"
        "setp.gt.f32 has_sign, %3, 0f00000000;\n"
        "selp.b32 %0, result, 0, has_sign;\n"
        "}"
        : "=f"(y) : "f"(a), "f"(x), "f"(absolute(x)));
    return y;
}
__device__ inline double with_sign_of(double a, double x) {
    double y;
    asm("{\n"
        ".reg .pred has_sign;\n"
        ".reg .b64 result;\n"
        "and.b64 result, %2, 0x8000000000000000;\n"
        "xor.b64 result, result, %1;\n"
        "setp.gt.f64 has_sign, %3, 0d0000000000000000;\n"
        "selp.b64 %0, result, 0, has_sign;\n"
        "}"
        : "=d"(y) : "d"(a), "d"(x), "d"(fabs(x)));
    return y;
}
#define signed(a, x) with_sign_of(a, x)

// |x| = m * 2^(shift - 1074), m < 2^53.
struct decoded { integer m; int shift; };
__device__ inline decoded decode(double x) {
    const integer bits = __double_as_longlong(fabs(x)), leading = 1ULL << 52;
    const int exponent = int(bits >> 52);
    if (exponent == 0) return {bits, 0};
    return {bits % leading + leading, exponent - 1};
}

// Binary64 whose exponent does not end, with the results of sums/extended.py: wherever binary64 has
// a finite number for the result of an operation, that number, and beyond its range 53 bits. It is
// for single threads and rare sums, so it is written to be seen through, not to be fast.

constexpr integer LEADING = 1ULL << 63;
constexpr long long ENDLESS = 1LL << 40;  // an exponent beyond all others

struct extended {
    integer m = 0;  // The value is m * 2^e. Of m, if not 0, the first bit is set, the last 11 are not.
    long long e = -ENDLESS;
    bool is_negative = false;  // never for 0
    double special = 0.0;      // infinity or NaN, else 0

    extended() = default;
    __device__ explicit extended(double x);
    __device__ explicit operator double() const;
    __device__ bool fits_double() const;
};

// Round m * 2^e, or up to one 2^e more if there are bits below, to 53 bits, to nearest-even; if in
// binary64, to the fewer bits of a subnormal number.
__device__ __noinline__ extended rounded(
    bool is_negative, integer m, long long e, bool below, bool in_binary64 = true) {
    extended result;
    if (m == 0) return result;
    const int empty = __clzll(m);  // at most 10 if there are bits below, so those stay below a half
    m = m << empty | below;
    e -= empty;
    const long long missing = -1022 - (e + 63);  // bits that a subnormal number lacks
    const int bits = in_binary64 && missing > 0 && missing <= 53 ? 53 - int(missing) : 53;
    if (bits == 0) {  // between 2^-1075, for which binary64 has 0, and its smallest number
        e += m != LEADING;
        m = LEADING;
    } else {
        const integer unit = 1ULL << (64 - bits), tail = m % unit;
        m -= tail;
        if (tail > unit / 2 || (tail == unit / 2 && (m & unit) != 0)) m += unit;
        if (m == 0) {
            m = LEADING;
            e += 1;
        }
    }
    result.m = m;
    result.e = e;
    result.is_negative = is_negative;
    return result;
}

__device__ inline extended::extended(double x) {
    if (isfinite(x)) {
        const decoded d = decode(x);
        *this = rounded(x < 0.0, d.m, d.shift - 1074, false);
    } else {
        special = x;
        is_negative = x < 0.0;
        m = LEADING;
        e = ENDLESS;
    }
}

__device__ inline extended::operator double() const {
    if (special != 0.0) return special;
    const extended r = rounded(is_negative, m, e, false);
    const long long top = r.e + 63;
    double size = 0.0;
    if (top > 1023) {
        size = CUDART_INF;
    } else if (top >= -1074) {
        const int missing = top < -1022 ? int(-1022 - top) : 0;
        const integer exponent = top < -1022 ? 0 : integer(top + 1022);  // and 1 for the first bit
        size = __longlong_as_double((exponent << 52) + (r.m >> (11 + missing)));
    }
    return is_negative ? -size : size;
}

// Whether it is 0, not finite, or a normal number of binary64.
__device__ inline bool extended::fits_double() const {
    return special != 0.0 || m == 0 || (e + 63 >= -1022 && e + 63 <= 1023);
}

__device__ inline bool isnan(const extended& a) { return isnan(a.special); }
__device__ inline void narrow(const extended& x, double& y) { y = double(x); }
__device__ inline void narrow(const extended& x, float& y) { narrow(double(x), y); }

__device__ inline bool either_special(const extended& a, const extended& b) {
    return a.special != 0.0 || b.special != 0.0;
}
__device__ inline bool is_smaller(const extended& a, const extended& b) {  // in size
    return a.e < b.e || (a.e == b.e && a.m < b.m);
}

__device__ inline extended negative(extended a) {
    a.is_negative = a.m != 0 && !a.is_negative;
    a.special = -a.special;
    return a;
}
__device__ __noinline__ extended add(const extended& x, const extended& y) {
    if (either_special(x, y)) return extended(double(x) + double(y));
    const extended &a = is_smaller(x, y) ? y : x, &b = is_smaller(x, y) ? x : y;
    const long long shift = a.e - b.e;
    const integer all = b.m >> 1, cut = shift < 64 ? all >> shift : 0;  // room for a carry
    const bool below = shift < 64 ? cut << shift != all : all != 0;
    const integer m = a.m >> 1;
    return rounded(
        a.is_negative, a.is_negative == b.is_negative ? m + cut : m - cut - below, a.e + 1, below);
}
__device__ inline extended subtract(const extended& a, const extended& b) {
    return add(a, negative(b));
}
__device__ __noinline__ extended multiply(const extended& a, const extended& b) {
    if (either_special(a, b)) return extended(double(a) * double(b));
    const integer high = __umul64hi(a.m, b.m), low = a.m * b.m;
    return rounded(a.is_negative != b.is_negative, high, a.e + b.e + 64, low != 0);
}
__device__ __noinline__ extended divide(const extended& a, const extended& b) {
    if (either_special(a, b) || b.m == 0) return extended(double(a) / double(b));
    const integer divisor = b.m >> 11;
    integer rest = a.m >> 11, quotient = 0;
    for (int k = 0; k < 63; ++k) {
        const bool bit = rest >= divisor;
        quotient = 2 * quotient + bit;
        rest = 2 * (bit ? rest - divisor : rest);
    }
    return rounded(a.is_negative != b.is_negative, quotient, a.e - b.e - 62, rest != 0);
}
__device__ __noinline__ extended root(const extended& a) {
    if (a.special != 0.0 || a.is_negative) return extended(sqrt(double(a)));
    const bool odd = a.e & 1;
    integer square = a.m >> odd, rest = 0, root = 0;
    for (int k = 0; k < 60; ++k) {  // 32 pairs of bits, and 28 pairs of zeros
        rest = rest << 2 | square >> 62;
        square <<= 2;
        const integer trial = root << 2 | 1;
        const bool bit = rest >= trial;
        rest = bit ? rest - trial : rest;
        root = root << 1 | integer(bit);
    }
    return rounded(false, root, (a.e + odd) / 2 - 28, rest != 0);
}
__device__ inline bool greater(const extended& a, const extended& b) {
    if (isnan(a) || isnan(b)) return false;
    if (a.is_negative != b.is_negative) return b.is_negative;
    return a.is_negative ? is_smaller(a, b) : is_smaller(b, a);
}
__device__ inline extended with_sign_of(const extended& a, const extended& x) {
    if (isnan(x) || x.m == 0) return extended();
    return x.is_negative ? negative(a) : a;
}
