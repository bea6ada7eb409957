import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.lang.reflect.Field;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.atomic.AtomicLongArray;
import sun.misc.Unsafe;

/**
 * A service whose state is in its heap alone: which instance it is and since when, what it was told,
 * how much it has worked. PUT /KEY stores the body, GET /KEY returns it, GET / tells of the instance.
 *
 * <p>The heap holds warm.megabytes of numbers that follow from the time of the start, so that who knows
 * it can tell the right answers: GET /sum looks at all of them, GET /peek/SEED at 32, each on another
 * page. GET /gc collects garbage, then answers as /sum. With warm.threads there are so many threads that
 * count and make garbage; GET /threads tells how many live, and the least that one has counted.
 *
 * <p>With warm.block there is a block of so many megabytes outside of the heap, as for a direct buffer.
 * GET /grow makes it 64 times as large, writes to all of it and tells whether it holds what it held.
 */
final class Warm {
    private static final String INSTANCE = UUID.randomUUID().toString();
    private static final long STARTED = System.currentTimeMillis();
    private static final ConcurrentHashMap<String, String> TOLD = new ConcurrentHashMap<>();
    private static final AtomicLong TICKS = new AtomicLong();
    private static final AtomicLongArray COUNTS = new AtomicLongArray(Integer.getInteger("warm.threads", 0));
    private static final Thread[] COUNTING = new Thread[COUNTS.length()];
    private static final int CHUNK = 8192; // numbers, 64 KiB: an object that a collector may move
    private static final int BLOCK = Integer.getInteger("warm.block", 0) << 20;
    private static long[][] ballast;
    private static Unsafe unsafe;
    private static long block;

    public static void main(String[] args) throws IOException, ReflectiveOperationException {
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.createContext("/", Warm::answer);
        server.setExecutor(Executors.newFixedThreadPool(2));
        // Memory that cannot be compressed away or shared, as a warmed cache would be.
        ballast = new long[Integer.getInteger("warm.megabytes", 16) * 16][CHUNK];
        long number = STARTED;
        for (long[] chunk : ballast) {
            for (int i = 0; i < CHUNK; i++) {
                number = next(number);
                chunk[i] = number;
            }
        }
        if (BLOCK > 0) {
            Field field = Unsafe.class.getDeclaredField("theUnsafe");
            field.setAccessible(true);
            unsafe = (Unsafe) field.get(null);
            block = unsafe.allocateMemory(BLOCK); // malloc
            for (long at = 0; at < BLOCK; at += 8) {
                number = next(number);
                unsafe.putLong(block + at, number);
            }
        }
        Thread ticker = new Thread(Warm::tick, "ticker");
        ticker.setDaemon(true);
        ticker.start();
        for (int i = 0; i < COUNTING.length; i++) {
            int id = i;
            COUNTING[i] = new Thread(() -> count(id), "count-" + i);
            COUNTING[i].start();
        }
        server.start();
    }

    private static long next(long number) {
        return number * 6364136223846793005L + 1442695040888963407L;
    }

    private static void tick() {
        while (true) {
            TICKS.incrementAndGet();
            try {
                Thread.sleep(200);
            } catch (InterruptedException e) {
                return;
            }
        }
    }

    private static void count(int id) {
        while (true) {
            byte[] garbage = new byte[4096 + id];
            garbage[id] = 1;
            COUNTS.addAndGet(id, garbage[id]);
            try {
                Thread.sleep(200);
            } catch (InterruptedException e) {
                return;
            }
        }
    }

    private static long sum() {
        long sum = 0;
        for (long[] chunk : ballast) {
            for (long number : chunk) {
                sum = sum * 31 + number;
            }
        }
        return sum;
    }

    private static long peek(long seed) {
        long sum = 0;
        for (int i = 0; i < 32; i++) {
            seed = next(seed);
            long at = Long.remainderUnsigned(seed >>> 16, (long) ballast.length * CHUNK);
            sum = sum * 31 + ballast[(int) (at / CHUNK)][(int) (at % CHUNK)];
        }
        return sum;
    }

    private static String grow() {
        long sum = 0;
        for (long at = 0; at < BLOCK; at += 8) {
            sum = sum * 31 + unsafe.getLong(block + at);
        }
        block = unsafe.reallocateMemory(block, 64L * BLOCK); // realloc
        long again = 0;
        for (long at = 0; at < BLOCK; at += 8) {
            again = again * 31 + unsafe.getLong(block + at);
        }
        unsafe.setMemory(block + BLOCK, 63L * BLOCK, (byte) 1);
        return sum == again && unsafe.getByte(block + 64L * BLOCK - 1) == 1 ? "grown" : "lost";
    }

    private static String threads() {
        int alive = 0;
        long least = Long.MAX_VALUE;
        for (int i = 0; i < COUNTING.length; i++) {
            alive += COUNTING[i].isAlive() ? 1 : 0;
            least = Math.min(least, COUNTS.get(i));
        }
        return alive + " " + least;
    }

    private static void answer(HttpExchange x) throws IOException {
        String key = x.getRequestURI().getPath().substring(1);
        String body;
        if (x.getRequestMethod().equals("PUT")) {
            TOLD.put(key, new String(x.getRequestBody().readAllBytes(), StandardCharsets.UTF_8));
            body = "stored";
        } else if (key.isEmpty()) {
            body = INSTANCE + " " + STARTED + " " + TICKS.get() + " " + ((long) ballast.length * CHUNK * 8);
        } else if (key.equals("sum")) {
            body = Long.toUnsignedString(sum());
        } else if (key.equals("gc")) {
            System.gc();
            body = Long.toUnsignedString(sum());
        } else if (key.equals("grow")) {
            body = grow();
        } else if (key.equals("threads")) {
            body = threads();
        } else if (key.startsWith("peek/")) {
            body = Long.toUnsignedString(peek(Long.parseLong(key.substring(5))));
        } else {
            body = TOLD.getOrDefault(key, "");
        }
        byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
        x.sendResponseHeaders(200, bytes.length == 0 ? -1 : bytes.length);
        x.getResponseBody().write(bytes);
        x.close();
    }
}
