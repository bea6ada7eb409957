import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.BufferedReader;
import java.io.Closeable;
import java.io.DataInputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.SecureRandom;
import java.util.HexFormat;
import java.util.concurrent.Executors;

/**
 * A service that is safe to be cloned from a warmed copy of itself. What must differ between two copies
 * is in one place, {@link Self}, and is made anew when /run/stasis/generation is another one than it was
 * made for. The hook of the pod asks for that, before the clone counts as started:
 *
 * <pre>stasis.dev/after-restore: exec ["wget", "-q", "-O", "-", "http://127.0.0.1:8080/cloned"]</pre>
 *
 * <p>GET / answers with this instance's id, a random number, and what the upstream says, whose HOST:PORT
 * is in the environment variable UPSTREAM: it answers each line with a line, and is told "hello ID" first.
 */
final class Service {
    private static final Path GENERATION = Path.of("/run/stasis/generation");
    private static volatile Self self;

    public static void main(String[] args) throws Exception {
        adopt();
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.createContext("/", x -> answer(x, self.id + " " + self.number() + " " + self.upstream.ask("next")));
        server.createContext("/cloned", Service::cloned);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.start();
    }

    /** Only from within the pod; to ask for it once more does nothing. */
    private static void cloned(HttpExchange x) throws IOException {
        if (!x.getRemoteAddress().getAddress().isLoopbackAddress()) {
            x.sendResponseHeaders(403, -1);
            x.close();
            return;
        }
        try {
            adopt();
            answer(x, self.id);
        } catch (GeneralSecurityException e) {
            x.sendResponseHeaders(500, -1); // the hook fails, and with it the clone
            x.close();
        }
    }

    /** Becomes somebody else, if this is another copy than before. */
    private static synchronized void adopt() throws IOException, GeneralSecurityException {
        String generation = "";
        try {
            generation = Files.readString(GENERATION).strip();
        } catch (NoSuchFileException e) {
            // Not under stasis: there are no copies.
        }
        Self old = self;
        if (old != null && old.generation.equals(generation)) {
            return;
        }
        self = new Self(generation);
        if (old != null) {
            old.upstream.close();
        }
    }

    /** What no two copies may have in common. */
    private static final class Self {
        final String generation;
        final String id;
        final Upstream upstream;
        private final SecureRandom random;

        Self(String generation) throws IOException, GeneralSecurityException {
            this.generation = generation;
            random = seeded();
            byte[] bytes = new byte[16];
            random.nextBytes(bytes);
            id = HexFormat.of().formatHex(bytes);
            upstream = new Upstream(id);
        }

        String number() {
            return Long.toHexString(random.nextLong());
        }

        /**
         * A new generator with a seed of the kernel's. That is asked by hand: SecureRandom.reseed() is
         * left to the provider, which may have a buffer or a seed generator in the heap that was cloned.
         */
        private static SecureRandom seeded() throws IOException, GeneralSecurityException {
            byte[] seed = new byte[48];
            try (DataInputStream urandom = new DataInputStream(Files.newInputStream(Path.of("/dev/urandom")))) {
                urandom.readFully(seed);
            }
            SecureRandom random = SecureRandom.getInstance("DRBG");
            random.setSeed(seed);
            return random;
        }
    }

    /** The one connection to the outside: established ones are closed in a clone. */
    private static final class Upstream implements Closeable {
        private final String hello;
        private Socket socket;
        private BufferedReader in;

        Upstream(String id) {
            hello = "hello " + id;
            ask(null);
        }

        /** Asks over the connection, once more over a new one, and then answers "-". */
        synchronized String ask(String question) {
            String address = System.getenv("UPSTREAM");
            if (address == null || address.isEmpty()) {
                return "-";
            }
            for (int i = 0; i < 2; i++) {
                try {
                    String answer = "";
                    if (socket == null) {
                        int colon = address.lastIndexOf(':');
                        socket = new Socket();
                        socket.setSoTimeout(2000);
                        socket.connect(new InetSocketAddress(address.substring(0, colon), Integer.parseInt(address.substring(colon + 1))), 2000);
                        in = new BufferedReader(new InputStreamReader(socket.getInputStream(), StandardCharsets.UTF_8));
                        answer = say(hello);
                    }
                    return question == null ? answer : say(question);
                } catch (IOException e) {
                    System.out.println("upstream: " + e);
                    close();
                }
            }
            return "-";
        }

        private String say(String line) throws IOException {
            socket.getOutputStream().write((line + "\n").getBytes(StandardCharsets.UTF_8));
            String answer = in.readLine();
            if (answer == null) {
                throw new IOException("closed");
            }
            return answer;
        }

        @Override
        public synchronized void close() {
            try {
                if (socket != null) {
                    socket.close();
                }
            } catch (IOException e) {
                System.out.println("upstream: " + e);
            }
            socket = null;
        }
    }

    private static void answer(HttpExchange x, String body) throws IOException {
        byte[] bytes = (body + "\n").getBytes(StandardCharsets.UTF_8);
        x.sendResponseHeaders(200, bytes.length);
        x.getResponseBody().write(bytes);
        x.close();
    }
}
