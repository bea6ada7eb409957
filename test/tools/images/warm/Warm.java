import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A service whose state is in its heap alone: which instance it is and since when, what it was told,
 * how much it has worked. PUT /KEY stores the body, GET /KEY returns it, GET / tells of the instance.
 */
final class Warm {
    private static final String INSTANCE = UUID.randomUUID().toString();
    private static final long STARTED = System.currentTimeMillis();
    private static final ConcurrentHashMap<String, String> TOLD = new ConcurrentHashMap<>();
    private static final AtomicLong TICKS = new AtomicLong();
    private static byte[] ballast;

    public static void main(String[] args) throws IOException {
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.createContext("/", Warm::answer);
        server.setExecutor(Executors.newFixedThreadPool(2));
        // Memory that cannot be compressed away or shared, as a warmed cache would be.
        ballast = new byte[Integer.getInteger("warm.megabytes", 16) << 20];
        long seed = STARTED;
        for (int i = 0; i < ballast.length; i += 8) {
            seed = seed * 6364136223846793005L + 1442695040888963407L;
            ballast[i] = (byte) (seed >> 56);
        }
        Thread ticker = new Thread(Warm::tick, "ticker");
        ticker.setDaemon(true);
        ticker.start();
        server.start();
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

    private static void answer(HttpExchange x) throws IOException {
        String key = x.getRequestURI().getPath().substring(1);
        String body;
        if (key.isEmpty()) {
            body = INSTANCE + " " + STARTED + " " + TICKS.get() + " " + ballast.length;
        } else if (x.getRequestMethod().equals("PUT")) {
            TOLD.put(key, new String(x.getRequestBody().readAllBytes(), StandardCharsets.UTF_8));
            body = "stored";
        } else {
            body = TOLD.getOrDefault(key, "");
        }
        byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
        x.sendResponseHeaders(200, bytes.length == 0 ? -1 : bytes.length);
        x.getResponseBody().write(bytes);
        x.close();
    }
}
