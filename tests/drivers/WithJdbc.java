import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.Statement;

/** pgjdbc: server-prepared statements (S_1 …) from the first execution, binary transfer, fetch sizes, isValid. */
public class WithJdbc {
    static String api;

    static String call(String method, String path) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(api + "/v1/projects/shop/branches/prod/compute" + path))
            .header("Content-Type", "application/json");
        var body = method.equals("GET") ? HttpRequest.BodyPublishers.noBody() : HttpRequest.BodyPublishers.ofString("{}");
        var answer = HttpClient.newHttpClient()
            .send(request.method(method, body).build(), HttpResponse.BodyHandlers.ofString());
        check(answer.statusCode() < 300, answer.body());
        return answer.body();
    }

    static boolean awake() throws Exception {
        return call("GET", "").contains("\"active\"");
    }

    static void check(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    public static void main(String[] args) throws Exception {
        api = args[1];
        try (Connection c = DriverManager.getConnection(args[0] + "&prepareThreshold=1&binaryTransfer=true")) {
            try (Statement s = c.createStatement()) {
                s.execute("set timezone = 'Asia/Tokyo'");
                s.execute("create table t (n int, w text)");
            }
            PreparedStatement put = c.prepareStatement("insert into t values (?, ?)");
            PreparedStatement count = c.prepareStatement("select count(*), max(w) from t where n > ?");
            PreparedStatement all = c.prepareStatement("select n from t order by n");
            all.setFetchSize(2);
            for (int n = 1; n <= 4; n++) {
                put.setInt(1, n);
                put.setString(2, "word");
                put.addBatch();
                check(put.executeBatch()[0] == 1, "one row is put");
                count.setInt(1, 0);
                try (ResultSet r = count.executeQuery()) {
                    check(r.next() && r.getInt(1) == n && r.getString(2).equals("word"), "all rows are there");
                }
                c.setAutoCommit(false);
                int seen = 0;
                try (ResultSet r = all.executeQuery()) {
                    while (r.next()) {
                        seen++;
                    }
                }
                c.commit();
                c.setAutoCommit(true);
                check(seen == n, "portals with row limits work");
                try (Statement s = c.createStatement(); ResultSet r = s.executeQuery("show timezone")) {
                    check(r.next() && r.getString(1).equals("Asia/Tokyo"), "the setting is kept");
                }
                check(c.isValid(5), "it is valid");
                call("POST", "/suspend");
                check(c.isValid(5) && !awake(), "asking whether it is valid wakes nothing");
            }
        }
        System.out.println("ok");
    }
}
