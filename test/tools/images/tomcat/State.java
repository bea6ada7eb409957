package primes;

import jakarta.servlet.annotation.WebServlet;
import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicLong;

/** GET /state tells which instance this is and how many pages it has made and kept. */
@WebServlet("/state")
public final class State extends HttpServlet {
    private static final String INSTANCE = UUID.randomUUID().toString();
    private static final AtomicLong REQUESTS = new AtomicLong();
    private static final ConcurrentHashMap<Integer, String> PAGES = new ConcurrentHashMap<>();

    /** A table of primes, made once for each number below 1000 and kept, as a cache of content would. */
    public static String page(int number) {
        REQUESTS.incrementAndGet();
        return PAGES.computeIfAbsent(Math.floorMod(number, 1000), State::table);
    }

    private static String table(int number) {
        StringBuilder table = new StringBuilder("<table>\n");
        int rows = 0;
        for (int n = number + 2; rows < 200; n++) {
            boolean prime = true;
            for (int d = 2; d * d <= n && prime; d++) {
                prime = n % d != 0;
            }
            if (prime) {
                table.append(String.format("<tr><td>%d</td><td>%x</td></tr>%n", n, n * 31L));
                rows++;
            }
        }
        return table.append("</table>").toString();
    }

    @Override
    protected void doGet(HttpServletRequest request, HttpServletResponse response) throws IOException {
        response.setContentType("text/plain");
        response.getWriter().print(INSTANCE + " " + REQUESTS.get() + " " + PAGES.size());
    }
}
