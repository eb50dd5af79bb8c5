import java.util.Scanner;
import java.util.stream.Stream;

public class Main {
    public static void main(String[] args) {
        String name = new Scanner(System.in).nextLine();
        System.out.println("Hello " + name + " " + Stream.of(args).mapToInt(Integer::parseInt).sum());
    }
}
