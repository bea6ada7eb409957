<%@ page contentType="text/html;charset=UTF-8" session="false" import="primes.State" %>
<% String n = request.getParameter("n"); int number = n == null ? 0 : Integer.parseInt(n); %>
<html><head><title>Primes from <%= number %></title></head>
<body><%= State.page(number) %></body></html>
